"""Other ways to write neighborhood attention in plain PyTorch, so that "naive" is never a straw man.

``naive`` itself is natten_ext's reference backend: window partition, matmul, table lookup, softmax and matmul for
grids; matmul with the key norms as a bias for L2; a gather of every query's keys for neighborhoods. More forms exist,
and ratios are taken against whichever is fastest for the order at hand. For neighborhoods:

- ``naive-mask``: all pairs of the map with a mask, on maps of up to 1024 tokens; wasteful, but one matrix product;
- ``naive-loop``: a loop over the kernel's offsets, which never gathers more than one key per query at a time;
- ``naive-block``: blocks of queries against the box of keys that any of them sees, with a mask, as language models
  write local attention (Longformer); on lines, on volumes, with strides or causal windows, without dilation.

For shifted windows: ``naive-roll``, Swin's own form, rolls the map and masks the windows that wrap around.
"""

from __future__ import annotations

import math

import torch

from .layout import (
    dense_bias,
    dense_index,
    flat,
    from_windows,
    grid_index,
    heads_first,
    heads_last,
    lookup,
    neighborhood_index,
    to_windows,
)
from .problem import Attend, CannotError
from .shapes import Shape, window_ranges

MASK_LIMIT = 1024  # tokens
LOOP_LIMIT = 128  # keys of a query


def covers(name: str, shape: Shape) -> bool:
    """Whether the form of naive called ``name`` is worth running for ``shape``."""
    if name == "naive":
        return True
    if name == "naive-roll":
        return shape.kind == "grid" and any(shape.neighborhood.first)
    if shape.kind != "neighborhood":
        return False
    dilated = set(shape.dilations) != {1}
    return {
        "naive-mask": shape.queries <= MASK_LIMIT,
        "naive-loop": shape.keys_per_query <= LOOP_LIMIT,
        "naive-block": shape.general and not dilated and not shape.table,
    }[name]


def prepare_mask(shape: Shape, device: torch.device, dtype: torch.dtype) -> Attend:
    places, masked = dense_index(shape, device)
    mask = masked.repeat_interleave(shape.heads // len(masked), 0)

    def attend(query, key, value, table):
        query, key, value = map(heads_first, (query, key, value))
        scores = (query * shape.head_dim**-0.5) @ key.transpose(-2, -1)
        if table is not None:
            scores = scores + dense_bias(shape, table, places)
        return heads_last(scores.masked_fill(mask, -math.inf).softmax(-1) @ value, shape)

    return attend


def prepare_loop(shape: Shape, device: torch.device, dtype: torch.dtype) -> Attend:
    groups = []
    for heads, _ in shape.head_groups:
        keys, places, exists = neighborhood_index(shape, heads.start)
        missing = None if exists.all() else ~exists[:, None].to(device)
        groups.append((heads, keys.t().contiguous().to(device), places.to(device), missing))

    def attend_group(query, key, value, table, keys, places, missing):
        axes = len(shape.size)
        query, key, value = (x.flatten(1, axes) for x in (query, key, value))
        query = query * shape.head_dim**-0.5
        scores = torch.stack([(query * key.index_select(1, at)).sum(-1) for at in keys], -1)
        if table is not None:
            scores = scores + lookup(table, places).transpose(0, 1)
        if missing is not None:
            scores = scores.masked_fill(missing, -math.inf)
        weights = scores.softmax(-1)
        output = 0
        for weight, at in zip(weights.unbind(-1), keys, strict=True):
            output = output + weight.unsqueeze(-1) * value.index_select(1, at)
        return output.view(-1, *shape.size, *output.shape[2:])

    def attend(query, key, value, table):
        parts = [
            attend_group(
                *(x[..., heads, :] for x in (query, key, value)), None if table is None else table[heads], *of_group
            )
            for heads, *of_group in groups
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    return attend


def prepare_block(shape: Shape, device: torch.device, dtype: torch.dtype) -> Attend:
    windows = shape.neighborhood.windows[0]
    queries, keys, sees = [], [], torch.ones(1, 1, 1, dtype=torch.bool)
    for length, window in zip(shape.size, windows, strict=True):
        # About half a window of queries, which leaves boxes of one and a half; whole groups of a stride.
        block = min(length, window.stride * max(1, round(window.kernel / 2 / window.stride)))
        own = torch.arange(0, length, block)[:, None] + torch.arange(block)
        seen = [window.keys(i, length) for i in range(length)]
        start, stop = (torch.tensor([getattr(of, end) for of in seen]) for end in ("start", "stop"))
        inside = own.clamp(max=length - 1)
        first = start[inside].amin(1, keepdim=True)
        others = first + torch.arange(int((stop[inside].amax(1, keepdim=True) - first).max()))
        seeing = (others[:, None] >= start[inside][..., None]) & (others[:, None] < stop[inside][..., None])
        queries.append(inside)
        keys.append(others.clamp(max=length - 1))
        sees = (
            (sees[:, None, :, None, :, None] & seeing[None, :, None, :, None, :]).flatten(4).flatten(2, 3).flatten(0, 1)
        )
    queries, keys = (flat(of_axes, shape.size).to(device) for of_axes in (queries, keys))
    places = torch.empty(shape.queries, dtype=torch.int64, device=device)
    places[queries.flatten()] = torch.arange(queries.numel(), device=device)
    masked = None if sees.all() else ~sees[:, None].to(device)

    def blocks(x, at):
        """``(batch, *map, heads, d)`` to ``(batch, blocks, heads, tokens of each, d)``."""
        return x.flatten(1, -3)[:, at].transpose(2, 3)

    def attend(query, key, value, table):
        scores = blocks(query * shape.head_dim**-0.5, queries) @ blocks(key, keys).transpose(-2, -1)
        if masked is not None:
            scores = scores.masked_fill(masked, -math.inf)
        output = (scores.softmax(-1) @ blocks(value, keys)).transpose(2, 3).flatten(1, 2)
        return output[:, places].view(shape.query_shape)

    return attend


def prepare_roll(shape: Shape, device: torch.device, dtype: torch.dtype) -> Attend:
    grid = shape.neighborhood
    if any(size % window for size, window in zip(shape.size, grid.window, strict=True)):
        raise CannotError("windows that do not divide the map")
    back, axes = [-start for start in grid.first], list(range(1, 1 + len(shape.size)))
    labels = torch.zeros(shape.size, dtype=torch.int64)  # which window each position is in
    for axis, (length, window, start) in enumerate(zip(shape.size, grid.window, grid.first, strict=True)):
        ranges = window_ranges(length, window, start)
        of_axis = torch.cat([torch.full((len(places),), number) for number, places in enumerate(ranges)])
        labels = labels * len(ranges) + of_axis.view(-1, *[1] * (len(shape.size) - axis - 1))
    labels = to_windows(labels[None, ..., None, None].roll(back, axes), grid.window).flatten(1)
    apart = (labels[:, :, None] != labels[:, None]).to(device)
    mask = torch.zeros(apart.shape, dtype=dtype, device=device).masked_fill(apart, -math.inf)[:, None]
    places = grid_index(grid.window).to(device)

    def attend(query, key, value, table):
        query, key, value = (to_windows(x.roll(back, axes), grid.window) for x in (query, key, value))
        scores = (query * shape.head_dim**-0.5) @ key.transpose(-2, -1)
        if table is not None:
            scores = scores + lookup(table, places)
        scores = (scores.unflatten(0, (-1, len(mask))) + mask).flatten(0, 1)
        return from_windows(scores.softmax(-1) @ value, shape).roll(grid.first, axes)

    return attend


VARIANTS = {
    "naive-mask": prepare_mask, "naive-loop": prepare_loop, "naive-block": prepare_block, "naive-roll": prepare_roll,
}  # fmt: skip
