"""The attention in plain PyTorch: the definition in code, differentiable to any order, on any device.

It stores all scores, so its memory grows with tokens times keys. It is what the fused backends are
tested against, what the benchmark calls naive, and the fallback for what no fused backend can run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import forward_ad

from ..geometry import AnyNeighborhood, AxisKeys, Full, Grid, Neighborhood, axis_keys, window_offsets
from ..orders import accumulation_dtype
from .origin import origin_of


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    neighborhood: AnyNeighborhood,
    score: str,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over ``neighborhood`` and, if asked for, its log-sum-exp; shapes as in ``natten_ext.functional``.

    Heads that share a key head must have one window.
    Half precision is computed, and its derivatives are added up, in float32.
    """
    dtype = query.dtype
    wide = accumulation_dtype(dtype)
    with without_autocast(query.device.type):
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
        bias = None if bias is None else bias.to(wide)
        if score == "l2":
            query, key = _distances_as_products(query, key)
        output, lse = _attention(query * scale, key, value, bias, neighborhood, return_lse)
        return output.to(dtype), lse


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which matrix products keep the precision of their arguments."""
    # torch knows no autocast for meta tensors.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Softmax along the last dimension that can be differentiated in every way."""
    if forward_ad._current_level < 0:
        return scores.softmax(-1)
    # The tangent of torch's own can't be differentiated: its formula changes in place what autograd has saved.
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def log_sum_exp(scores: torch.Tensor) -> torch.Tensor:
    """Logarithm of the sum of exponentials along the last dimension that can be differentiated in every way.

    NaN where a score is infinity, as the softmax.
    """
    if forward_ad._current_level < 0:
        lse = scores.logsumexp(-1)
        return lse + torch.where(lse == torch.inf, torch.nan, 0.0).to(lse.dtype)
    largest = scores.detach().amax(-1, keepdim=True)  # as softmax
    largest = torch.where(largest.isinf(), 0, largest)
    return (scores - largest).exp().sum(-1).log() + largest.squeeze(-1)


def _distances_as_products(query, key):
    """Vectors of two more channels whose products are -|q-k|^2 = 2 q.k - |q|^2 - |k|^2.

    Softmax removes |q|^2, but its derivatives keep those of q exact where a key takes all of the weight.
    """
    origin = origin_of(key)
    query = query - origin.repeat_interleave(query.shape[-2] // key.shape[-2], -2)
    key = key - origin
    query_square, key_square = (x.square().sum(-1, keepdim=True) for x in (query, key))
    query = torch.cat([2 * query, -query_square, torch.full_like(query_square, -1)], -1)
    return query, torch.cat([key, torch.ones_like(key_square), key_square], -1)


def _attention(query, key, value, bias, neighborhood, return_lse):
    if isinstance(neighborhood, Full):
        return _full(query, key, value, None, return_lse)
    if isinstance(neighborhood, Grid):
        return _grid(query, key, value, bias, neighborhood, return_lse)
    parts = []
    shared = query.shape[-2] // key.shape[-2]
    for first, last in neighborhood.head_groups():
        heads, key_heads = slice(first, last), slice(first // shared, last // shared)
        group_bias = None if bias is None else bias[heads]
        group = query[..., heads, :], key[..., key_heads, :], value[..., key_heads, :]
        parts.append(_neighborhood(*group, group_bias, neighborhood, first, return_lse))
    if len(parts) == 1:
        return parts[0]
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, -2), torch.cat(lses, -1) if return_lse else None


def _full(query, key, value, bias, return_lse):
    """Sequences ``(batch, tokens, heads, channels)``; bias ``(heads, queries, keys)``."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    shared = query.shape[1] // key.shape[1]

    def by_key_head(x):  # heads that share keys are more queries of one
        return x.unflatten(1, (-1, shared)).flatten(2, 3)

    def by_head(x):
        return x.unflatten(2, (shared, -1)).flatten(1, 2)

    scores = by_head(by_key_head(query) @ key.mT)
    if bias is not None:
        scores = scores + bias
    output = by_head(by_key_head(softmax(scores)) @ value)
    return output.transpose(1, 2), log_sum_exp(scores).transpose(1, 2) if return_lse else None


def _grid(query, key, value, bias, neighborhood, return_lse):
    window = neighborhood.window
    axes = len(window)
    counts = [extent // size for extent, size in zip(value.shape[1:-2], window, strict=True)]
    # Dimensions of a map whose every axis is split in two: which window, and where in it.
    outer, inner = [1 + 2 * axis for axis in range(axes)], [2 + 2 * axis for axis in range(axes)]

    def partition(x):
        x = x.reshape(x.shape[0], *itertools.chain(*zip(counts, window, strict=True)), *x.shape[1 + axes :])
        x = x.permute(0, *outer, *inner, *range(1 + 2 * axes, x.dim()))
        return x.flatten(0, axes).flatten(1, axes)

    def whole(x):
        x = x.reshape(value.shape[0], *counts, *window, *x.shape[2:])
        x = x.permute(0, *itertools.chain(*zip(range(1, 1 + axes), range(1 + axes, 1 + 2 * axes), strict=True)),
                      *range(1 + 2 * axes, x.dim()))  # fmt: skip
        return x.reshape(value.shape[0], *value.shape[1 : 1 + axes], *x.shape[1 + 2 * axes :])

    if bias is not None:
        places = [(window_offsets(size) + size - 1).to(bias.device) for size in window]
        bias = bias[_each(spread(places))].flatten(1, axes).flatten(2)
    output, lse = _full(partition(query), partition(key), partition(value), bias, return_lse)
    return whole(output), whole(lse) if return_lse else None


def _neighborhood(query, key, value, bias, neighborhood, head, return_lse):
    """Heads that share the windows of ``head``: keys are gathered per query."""
    keys = keys_on_map(query.shape[1:-2], neighborhood, head)
    axes = len(keys)
    index = spread([of_axis.index.to(query.device) for of_axis in keys])

    def gather(tensor):
        """``(batch, *map, heads, channels)`` to ``(batch, *map, heads, keys, channels)``."""
        return tensor[_each(index)].flatten(1 + axes, 2 * axes).transpose(-3, -2)

    shared = query.unflatten(-2, (key.shape[-2], -1))  # by the key head that they share
    scores = (shared @ gather(key).mT).flatten(-3, -2)
    if bias is not None:
        places = [(k.offset + size - 1).to(query.device) for k, size in zip(keys, neighborhood.kernel, strict=True)]
        scores = scores + bias[_each(spread(places))].flatten(1 + axes).movedim(0, -2)
    if any(window.causal for window in neighborhood.windows[head]):
        exists = math.prod(spread([of_axis.exists.to(query.device) for of_axis in keys]))
        scores = scores.masked_fill(~exists.bool().flatten(axes).unsqueeze(-2), -torch.inf)
    output = (softmax(scores).unflatten(-2, shared.shape[-3:-1]) @ gather(value)).flatten(-3, -2)
    return output, log_sum_exp(scores) if return_lse else None


def keys_on_map(extents: Sequence[int], neighborhood: Neighborhood, head: int) -> list[AxisKeys]:
    """The keys that queries see, one map axis after the other."""
    return [axis_keys(range(n), n, window) for n, window in zip(extents, neighborhood.windows[head], strict=True)]


def _each(index):
    """An index of the dimensions after the first, for each entry of the first."""
    return slice(None), *index


def spread(of_axes):
    """Of each axis a ``(queries, keys)``, as they broadcast to ``(*queries of the axes, *keys of the axes)``."""
    axes = len(of_axes)
    spread = []
    for axis, numbers in enumerate(of_axes):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = numbers.shape
        spread.append(numbers.reshape(shape))
    return spread
