"""Index tensors and window partition shared by the candidates that are written in plain PyTorch."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch

from natten_ext.geometry import axis_keys, window_offsets

from .shapes import Shape


def flat(of_axes: Sequence[torch.Tensor], extents: Sequence[int]) -> torch.Tensor:
    """Of ``(queries, keys)`` numbers on each axis, those of all pairs of the map, with axes of these extents."""
    numbers = torch.zeros(1, 1, dtype=torch.int64)
    for of_axis, extent in zip(of_axes, extents, strict=True):
        numbers = (numbers[:, None, :, None] * extent + of_axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return numbers


def neighborhood_index(shape: Shape, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the map as a head sees it: the flat keys of every query, their places in the flat table, and whether each is
    a key, all ``(tokens, keys)``. In the place of a key that a causal window lacks stands the query's first one."""
    windows, table = shape.neighborhood.windows[head], [2 * extent - 1 for extent in shape.kernel]
    found = [axis_keys(range(length), length, window) for length, window in zip(shape.size, windows, strict=True)]
    offsets = [keys.offset + extent - 1 for keys, extent in zip(found, shape.kernel, strict=True)]
    missing = flat([(~keys.exists).long() for keys in found], [1] * len(found))
    return flat([keys.index for keys in found], shape.size), flat(offsets, table), missing == 0


def grid_index(window: tuple[int, ...]) -> torch.Tensor:
    """Places in the flat table of every (query, key) of a window, ``(tokens, tokens)``."""
    return flat([window_offsets(extent) + extent - 1 for extent in window], [2 * extent - 1 for extent in window])


@functools.lru_cache(maxsize=1)
def dense_index(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For all pairs of a map, per group of heads: the place in the flat table, and whether the key is masked out.

    Both are ``(groups, tokens, tokens)``; the place of a masked pair is 0. The last answer is kept: it is large, and
    several candidates share it.
    """
    tokens = shape.queries
    places = torch.zeros(len(shape.dilations), tokens, tokens, dtype=torch.int32, device=device)
    masked = torch.ones(len(shape.dilations), tokens, tokens, dtype=torch.bool, device=device)
    for group, (heads, _) in enumerate(shape.head_groups):
        keys, where, _ = (x.to(device) for x in neighborhood_index(shape, heads.start))
        places[group].scatter_(1, keys, where.int())
        masked[group].scatter_(1, keys, False)
    return places, masked


def lookup(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Values of a ``(heads, ..., columns)`` table at flat places: ``(heads, *places.shape)``."""
    return table.flatten(1).index_select(1, places.flatten()).view(-1, *places.shape)


def dense_bias(shape: Shape, table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``(heads, tokens, tokens)``: a table's values at the places of ``dense_index``."""
    return torch.cat([lookup(table[heads], places[i]) for i, (heads, _) in enumerate(shape.head_groups)])


def to_windows(x: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
    """``(batch, *map, heads, d)`` to ``(batch * windows, heads, tokens of a window, d)``."""
    axes = len(window)
    counts = [extent // size for extent, size in zip(x.shape[1:-2], window, strict=True)]
    x = x.reshape(x.shape[0], *itertools.chain(*zip(counts, window, strict=True)), *x.shape[-2:])
    outer, inner = range(1, 1 + 2 * axes, 2), range(2, 2 + 2 * axes, 2)
    return x.permute(0, *outer, 1 + 2 * axes, *inner, 2 + 2 * axes).reshape(
        -1, x.shape[-2], math.prod(window), x.shape[-1]
    )


def from_windows(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The inverse of ``to_windows``."""
    axes = len(shape.size)
    counts = [extent // size for extent, size in zip(shape.size, shape.kernel, strict=True)]
    x = x.reshape(shape.batch, *counts, shape.heads, *shape.kernel, shape.head_dim)
    between = itertools.chain(*((1 + axis, 2 + axes + axis) for axis in range(axes)))
    return x.permute(0, *between, 1 + axes, 2 + 2 * axes).reshape(shape.query_shape)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """``(batch, ..., heads, d)`` to ``(batch, heads, tokens, d)``."""
    return x.flatten(1, -3).transpose(1, 2)


def heads_last(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The inverse of ``heads_first``."""
    return x.transpose(1, 2).reshape(shape.query_shape)
