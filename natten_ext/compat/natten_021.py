"""NATTEN's current function (0.21) for two dimensions, over the fused attention of this package."""

from __future__ import annotations

from typing import Any

import torch

from .. import functional
from ..checks import SizePerAxis, check_bias, check_dense, checked_maps, extents_of, neighborhood_of, shown
from ..geometry import Extents


def na2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: SizePerAxis,
    stride: SizePerAxis = 1,
    dilation: SizePerAxis = 1,
    is_causal: bool | tuple[bool, bool] | None = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: tuple[int, int] | None = None,
    kv_tile_shape: tuple[int, int] | None = None,
    backward_q_tile_shape: tuple[int, int] | None = None,
    backward_kv_tile_shape: tuple[int, int] | None = None,
    backward_kv_splits: tuple[int, int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    rpb: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Neighborhood attention on a map with the signature of ``natten.na2d`` (NATTEN 0.21), and three derivative orders.

    What this package lacks raises NotImplementedError with the argument's name: a ``stride`` other than 1, causal
    masks, additional keys and values, fewer key heads than query heads, and NATTEN's tuning of tiles and schedules.
    ``rpb``, the relative position table that NATTEN dropped in 0.20, is here again. ``neighborhood_attention`` also
    takes kernels and dilations per group of heads, and other scores.

    Args:
        query, key, value: ``(batch, height, width, heads, head_dim)``, one shape and dtype.
        kernel_size, dilation: int or (height, width), as a tuple or, unlike in ``neighborhood_attention``, a list;
            ``kernel_size * dilation`` must not exceed the map.
        scale: positive factor of the score; ``head_dim ** -0.5`` if None.
        backend: a name from ``natten_ext.list_backends()``, not one of NATTEN's.
        return_lse: whether to return the log-sum-exp as well, as ``neighborhood_attention`` does.
        rpb: ``(heads, 2 * kernel_height - 1, 2 * kernel_width - 1)``, added to the scaled scores.

    Returns:
        ``(batch, height, width, heads, head_dim)``; with ``return_lse`` a tuple of it and the log-sum-exp.

    Raises:
        As ``neighborhood_attention``; NotImplementedError as above.
    """
    refuse("stride", stride, "strides other than 1", allowed=pair_of("stride", stride) == (1, 1))
    refuse_causal(is_causal)
    refuse("additional_keys", additional_keys, "additional keys", allowed=additional_keys is None)
    refuse("additional_values", additional_values, "additional values", allowed=additional_values is None)
    refuse("attention_kwargs", attention_kwargs, "options of another attention", allowed=attention_kwargs is None)
    tuning = {
        "q_tile_shape": (q_tile_shape, None),
        "kv_tile_shape": (kv_tile_shape, None),
        "backward_q_tile_shape": (backward_q_tile_shape, None),
        "backward_kv_tile_shape": (backward_kv_tile_shape, None),
        "backward_kv_splits": (backward_kv_splits, None),
        "backward_use_pt_reduction": (backward_use_pt_reduction, False),
        "run_persistent_kernel": (run_persistent_kernel, True),
        "kernel_schedule": (kernel_schedule, None),
        "torch_compile": (torch_compile, False),
    }
    for name, (given, default) in tuning.items():
        refuse(name, given, "NATTEN's tuning of its kernels", allowed=given is default)
    check_dense("query", query)
    check_dense("key", key)
    if query.dim() == key.dim() == 5:
        same = query.shape[3] == key.shape[3]
        refuse("key", tuple(key.shape), f"other heads than the query's {query.shape[3]}", allowed=same)
    return fused(query, key, value, kernel_size, dilation, rpb, scale, backend, return_lse)


def fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Any,
    dilation: Any,
    rpb: torch.Tensor | None,
    scale: float | None,
    backend: str | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``neighborhood_attention`` with NATTEN's names of arguments in its messages."""
    query, key, value = checked_maps(query, key, value)
    kernel, step = pair_of("kernel_size", kernel_size), pair_of("dilation", dilation)
    neighborhood = neighborhood_of(query.shape[1:3], query.shape[3], kernel, step)
    check_bias("rpb", rpb, query, neighborhood)
    return functional.run(query, key, value, rpb, neighborhood, "dot", scale, backend, return_lse)


def pair_of(name: str, size: Any) -> Extents:
    """(height, width) from an int, a tuple or, as in NATTEN, a list of two; never one entry per group of heads."""
    return extents_of(name, tuple(size) if isinstance(size, list) else size, 2)


def refuse(name: str, value: Any, what: str, *, allowed: bool) -> None:
    """NotImplementedError that names the argument, unless it is allowed."""
    if not allowed:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else shown(value)
        raise NotImplementedError(f"{name}: natten_ext does not support {what}, got {got}")


def refuse_causal(is_causal: bool | tuple[bool, bool] | None) -> None:
    causal = any(is_causal) if isinstance(is_causal, tuple | list) else bool(is_causal)
    refuse("is_causal", is_causal, "causal masks", allowed=not causal)
