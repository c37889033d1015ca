"""Index tensors and window partition shared by the candidates that are written in plain PyTorch."""

from __future__ import annotations

import functools

import torch

from .shapes import Shape


def neighbors(length: int, kernel: int, dilation: int) -> torch.Tensor:
    """``(length, kernel)``: the keys of each query on one axis, by NATTEN's rule."""
    query = torch.arange(length)
    residue, place = query % dilation, query // dilation
    class_length = (length - residue + dilation - 1) // dilation
    start = torch.minimum((place - kernel // 2).clamp(min=0), class_length - kernel)
    return residue[:, None] + dilation * (start[:, None] + torch.arange(kernel))


def neighborhood_index(shape: Shape, dilation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For a map: the flat keys of every query and their places in the flat table, both ``(tokens, kernel**2)``."""
    (height, width), kernel = shape.size, shape.window
    rows, columns = neighbors(height, kernel, dilation), neighbors(width, kernel, dilation)
    keys = rows[:, None, :, None] * width + columns[None, :, None, :]
    dy = (rows - torch.arange(height)[:, None]) // dilation + kernel - 1
    dx = (columns - torch.arange(width)[:, None]) // dilation + kernel - 1
    places = dy[:, None, :, None] * (2 * kernel - 1) + dx[None, :, None, :]
    return keys.reshape(height * width, -1), places.reshape(height * width, -1)


def grid_index(window: int) -> torch.Tensor:
    """Places in the flat table of every (query, key) of a window, ``(window**2, window**2)``."""
    offset = torch.arange(window)[None] - torch.arange(window)[:, None] + window - 1
    places = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
    return places.reshape(window**2, window**2)


@functools.lru_cache(maxsize=1)
def dense_index(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For all pairs of a map, per group of heads: the place in the flat table, and whether the key is masked out.

    Both are ``(groups, tokens, tokens)``; the place of a masked pair is 0. The last answer is kept: it is large, and
    several candidates share it.
    """
    tokens = shape.queries
    places = torch.zeros(len(shape.dilations), tokens, tokens, dtype=torch.int32, device=device)
    masked = torch.ones(len(shape.dilations), tokens, tokens, dtype=torch.bool, device=device)
    for group, dilation in enumerate(shape.dilations):
        keys, where = (x.to(device) for x in neighborhood_index(shape, dilation))
        places[group].scatter_(1, keys, where.int())
        masked[group].scatter_(1, keys, False)
    return places, masked


def lookup(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Values of a ``(heads, rows, columns)`` table at flat places: ``(heads, *places.shape)``."""
    return table.flatten(1).index_select(1, places.flatten()).view(-1, *places.shape)


def dense_bias(shape: Shape, table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``(heads, tokens, tokens)``: a table's values at the places of ``dense_index``."""
    return torch.cat([lookup(table[heads], places[i]) for i, (heads, _) in enumerate(shape.head_groups)])


def to_windows(x: torch.Tensor, window: int) -> torch.Tensor:
    """``(batch, height, width, heads, d)`` to ``(batch * windows, heads, window**2, d)``."""
    batch, height, width, heads, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, heads, channels)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, window**2, channels)


def from_windows(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The inverse of ``to_windows``."""
    height, width = shape.size
    x = x.reshape(
        shape.batch, height // shape.window, width // shape.window,
        shape.heads, shape.window, shape.window, shape.head_dim,
    )  # fmt: skip
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(shape.query_shape)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """``(batch, ..., heads, d)`` to ``(batch, heads, tokens, d)``."""
    return x.flatten(1, -3).transpose(1, 2)


def heads_last(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The inverse of ``heads_first``."""
    return x.transpose(1, 2).reshape(shape.query_shape)
