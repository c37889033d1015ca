"""Unfused neighborhood attention, as NATTEN had it up to 0.17: scores, and the sum of values that they weigh.

The scores between the two calls are a tensor of their own, ``prod(kernel)`` numbers a query and head. The functions
work on any device and to any derivative order (in reverse mode, also by ``torch.func``), in memory proportional to
their arguments. On a GPU the backward pass adds in no fixed order unless ``torch.use_deterministic_algorithms`` asks
for it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from ..backends.reference import spread
from ..checks import alike, check_dense, check_table, layout_of_map, neighborhood_of, shape_of
from ..geometry import AxisKeys, HeadWindow
from .arguments import Flags, Size, flags, for_axes, sizes
from .bilinear import Gather, Scores, keys_of, wide


def _qk(axes: int) -> Callable[..., torch.Tensor]:
    def qk(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: Size,
        dilation: Size = 1,
        additional_keys: torch.Tensor | None = None,
        is_causal: Flags = False,
        rpb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of every query with the keys of its neighborhood: ``q_i . k_j + rpb``, not scaled (scale the query).

        Args:
            query, key: ``(batch, heads, *map, head_dim)``, one shape and floating dtype.
            kernel_size, dilation: int, or one per map axis; ``kernel_size * dilation`` must not exceed the map.
            additional_keys: ``(batch, heads, tokens, head_dim)``, which every query sees as well.
            is_causal: bool, or one per map axis.
            rpb: relative position table ``(heads, *(2 * kernel_size - 1))``, indexed by (key minus query) / dilation
                plus ``kernel_size - 1``. NATTEN has none for causal windows; here it has its meaning there too.

        Returns:
            ``(batch, heads, *map, prod(kernel_size) + tokens)``, in the query's dtype: keys in row-major order, then
            the additional ones. A query that has fewer keys, near the start of a causal axis, has minus infinity in the
            place of the missing.

        Raises:
            TypeError, ValueError: an argument breaks a rule above.
        """
        query, key = alike(layout_of_map(axes, "batch, heads", "channels"), query=query, key=key)
        if key.shape != query.shape:
            raise ValueError(f"key must have the query's shape {shape_of(query)}, got {shape_of(key)}")
        windows = _windows(query, kernel_size, dilation, is_causal)
        if rpb is not None:
            check_table("rpb", rpb, query, query.shape[1], tuple(window.kernel for window in windows))
        scores = Scores.apply(query, key, windows)
        keys = keys_of(query, windows)
        if rpb is not None:
            places = [of_axis.offset + window.kernel - 1 for of_axis, window in zip(keys, windows, strict=True)]
            # In float32, because the table's gradient is a sum over all queries that is rounded once.
            table = wide(rpb)[(slice(None), *spread(places))].flatten(-axes)
            scores = (wide(scores) + table).to(scores.dtype)
        if any(window.causal for window in windows):
            scores = scores.masked_fill(~_exists(keys), -torch.inf)
        if additional_keys is None:
            return scores
        additional_keys = _additional("additional_keys", additional_keys, query)
        return torch.cat([scores, torch.einsum("bh...c,bhnc->bh...n", query, additional_keys)], -1)

    return qk


def _av(axes: int) -> Callable[..., torch.Tensor]:
    def av(
        attn: torch.Tensor,
        value: torch.Tensor,
        kernel_size: Size,
        dilation: Size = 1,
        additional_values: torch.Tensor | None = None,
        is_causal: Flags = False,
    ) -> torch.Tensor:
        """Sum of the values of every query's neighborhood, weighted by ``attn``.

        Args:
            attn: ``(batch, heads, *map, prod(kernel_size) + tokens)``, in the order of ``na{axes}d_qk``. Entries in the
                place of missing keys do not count.
            value: ``(batch, heads, *map, channels)``, the same dtype.
            kernel_size, dilation, is_causal: as for ``na{axes}d_qk``.
            additional_values: ``(batch, heads, tokens, channels)``.

        Returns:
            ``(batch, heads, *map, channels)``.

        Raises:
            TypeError, ValueError: an argument breaks a rule above.
        """
        attn, value = alike(layout_of_map(axes, "batch, heads", "channels"), attn=attn, value=value)
        windows = _windows(value, kernel_size, dilation, is_causal)
        count, extra = math.prod([window.kernel for window in windows]), 0
        if additional_values is not None:
            additional_values = _additional("additional_values", additional_values, value)
            extra = additional_values.shape[2]
        if shape_of(attn) != (*value.shape[:-1], count + extra):
            raise ValueError(
                f"attn must have the value's shape with {count} entries for the keys of the kernel and {extra} for"
                f" additional ones, {(*value.shape[:-1], count + extra)}, got {shape_of(attn)}"
            )
        weights = attn[..., :count]
        if any(window.causal for window in windows):
            weights = weights.masked_fill(~_exists(keys_of(value, windows)), 0)
        total = Gather.apply(weights, value, windows)
        if additional_values is None:
            return total
        return total + torch.einsum("bh...n,bhnc->bh...c", attn[..., count:], additional_values)

    return av


na1d_qk, na2d_qk, na3d_qk = for_axes("na{axes}d_qk", _qk)
na1d_av, na2d_av, na3d_av = for_axes("na{axes}d_av", _av)


def _windows(maps: torch.Tensor, kernel_size: Size, dilation: Size, is_causal: Flags) -> HeadWindow:
    """Of every head."""
    axes = maps.dim() - 3
    kernel, step = sizes("kernel_size", kernel_size, axes), sizes("dilation", dilation, axes)
    return neighborhood_of(maps.shape[2:-1], 1, kernel, step, 1, flags("is_causal", is_causal, axes)).windows[0]


def _exists(keys: list[AxisKeys]) -> torch.Tensor:
    """Which of a query's keys it has: bool ``(*map, prod(kernel))``."""
    return functools.reduce(operator.and_, spread([of_axis.exists for of_axis in keys])).flatten(-len(keys))


def _additional(name: str, tensor: Any, maps: torch.Tensor) -> torch.Tensor:
    """Found to fit the maps, and in autocast's dtype where that is on."""
    check_dense(name, tensor)
    batch, heads, channels = *maps.shape[:2], maps.shape[-1]
    if tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[-1]) != (batch, heads, channels):
        raise ValueError(
            f"{name} must be (batch, heads, tokens, channels) = ({batch}, {heads}, any, {channels}),"
            f" got {shape_of(tensor)}"
        )
    tensor, _ = alike("(batch, heads, tokens, channels)", **{name: tensor, "the maps": maps.flatten(2, -2)})
    return tensor
