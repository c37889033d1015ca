"""Attention written from its definition, to judge every implementation by.

For each head and query the neighborhood is a plain list of keys and offsets, made by Python loops
that build residue classes as lists of positions; nothing here is shared with `natten_ext`. The arithmetic is PyTorch
on the gathered keys, so autograd gives every order of derivative. Run in float64 it is the truth; run in a lower
precision it is "the same computation in plain PyTorch", which the error budget is measured against.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

Extents = tuple[int, ...]
Neighbors = tuple[tuple[tuple[int, Extents], ...], ...]
"""For every query (row-major), its keys as (key index, offset on each map axis); offsets are key minus query."""


def axis_neighbors(
    position: int, length: int, kernel: int, dilation: int, stride: int = 1, causal: bool = False
) -> list[int]:
    """Positions that `position` attends to along one axis: members of its residue class, kept inside it."""
    members = [p for p in range(length) if (p - position) % dilation == 0]
    if len(members) < kernel:
        raise ValueError(f"{length} positions at dilation {dilation} hold {len(members)} members, fewer than {kernel}")
    groups = [members[i : i + stride] for i in range(0, len(members), stride)]
    (group,) = (group for group in groups if position in group)
    place = stride - 1 if causal else stride // 2
    leader = members.index(group[place] if place < len(group) else group[-1])
    if causal:
        return [key for key in members[: leader + 1][-kernel:] if key <= position]
    first = leader - kernel // 2
    while first < 0:
        first += 1
    while first + kernel > len(members):
        first -= 1
    return members[first : first + kernel]


def full_neighbors(queries: int, keys: int) -> Neighbors:
    """Every query attends to every key; there is no table, so offsets are zero."""
    return tuple(tuple((key, (0,)) for key in range(keys)) for _ in range(queries))


def _on_map(extents: Extents, keys_of, units: Extents) -> Neighbors:
    """`keys_of(axis, position)` of every axis together; offsets in units."""
    result = []
    for query in itertools.product(*map(range, extents)):
        entries = []
        for key in itertools.product(*(keys_of(axis, position) for axis, position in enumerate(query))):
            index = 0
            for position, extent in zip(key, extents, strict=True):
                index = index * extent + position
            entries.append((index, tuple((k - q) // u for k, q, u in zip(key, query, units, strict=True))))
        result.append(tuple(entries))
    return tuple(result)


@cache
def grid_neighbors(extents: Extents, window: Extents, shift: Extents | None = None) -> Neighbors:
    """Every query attends to the keys with which it shares a cell of the grid, whose lines are shifted."""
    shift = shift or (0,) * len(extents)

    def keys_of(axis: int, position: int) -> list[int]:
        lines = range(shift[axis] - window[axis], extents[axis] + window[axis], window[axis])
        start = max(line for line in lines if line <= position)
        return [key for key in range(extents[axis]) if start <= key < start + window[axis]]

    return _on_map(extents, keys_of, (1,) * len(extents))


@cache
def sliding_neighbors(
    extents: Extents, kernel: Extents, dilation: Extents, stride: Extents, causal: tuple[bool, ...]
) -> Neighbors:
    """Every query attends to a window that slides with it; offsets are in units of the dilation."""

    def keys_of(axis: int, position: int) -> list[int]:
        return axis_neighbors(position, extents[axis], kernel[axis], dilation[axis], stride[axis], causal[axis])

    return _on_map(extents, keys_of, dilation)


@cache
def pair_tables(neighbors: Neighbors, keys: int) -> tuple[Tensor, Tensor]:
    """For every (query, key): whether it is a pair of the neighborhood, and its offsets (0 if not), one map axis after
    the other."""
    axes = len(neighbors[0][0][1])
    allowed = torch.zeros(len(neighbors), keys, dtype=torch.bool)
    offsets = torch.zeros(axes, len(neighbors), keys, dtype=torch.int64)
    for query, entries in enumerate(neighbors):
        listed = torch.tensor([key for key, _ in entries], dtype=torch.int64)
        allowed[query, listed] = True
        assert allowed[query].sum() == len(entries), "a key is listed twice"
        offsets[:, query, listed] = torch.tensor([offset for _, offset in entries]).T.reshape(axes, -1)
    return allowed, offsets


def table_index(offsets: Tensor, table: Tensor) -> Tensor:
    """Where pairs with these offsets, one map axis after the other, find their entry in a head's table, flattened.

    `table` is `(heads, ...)`, with the offset of zero in its centre.
    """
    index = 0
    for of_axis, extent in zip(offsets, table.shape[1:], strict=True):
        index = index * extent + of_axis + extent // 2
    return index


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    neighbors: tuple[Neighbors, ...],
    *,
    score: str,
    scale: float,
    expanded: bool = False,
    additional: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over its listed keys, all scores held at once, and the log-sum-exp of its scores.

    `query`, `key` and `value` are `(batch, *positions, heads, head_dim)`, `table` is `(heads, ...)` with one axis per
    map axis and the offset of zero in its centre, and `neighbors` has one entry per head. The score "l2" is computed as
    defined, from differences, or with `expanded` as everybody computes it in practice: from products, less what
    softmax removes (the log-sum-exp is not that of the scores then). `additional` keys and values `(batch, tokens,
    heads, ...)` are attended by every query as well.
    """
    query_tokens, key_tokens, value_tokens = (tensor.flatten(1, -3) for tensor in (query, key, value))
    outputs, lses = [], []
    for head, sets in enumerate(neighbors):
        allowed, offsets = pair_tables(sets, key_tokens.shape[1])
        q, k, v = (tokens[:, :, head] for tokens in (query_tokens, key_tokens, value_tokens))
        if additional is not None:
            k, v = (torch.cat([x, more[:, :, head]], 1) for x, more in zip((k, v), additional, strict=True))
        if score == "dot":
            scores = scale * (q @ k.transpose(1, 2))
        elif score == "l2" and expanded:
            scores = 2 * scale * (q @ k.transpose(1, 2)) - scale * k.square().sum(-1).unsqueeze(1)
        elif score == "l2":
            scores = -scale * (q.unsqueeze(2) - k.unsqueeze(1)).square().sum(-1)
        else:
            raise ValueError(f"score {score!r}")
        more = k.shape[1] - allowed.shape[1]
        if table is not None:
            scores = scores + pad(table[head].flatten()[table_index(offsets, table)], (0, more))
        scores = scores.masked_fill(~pad(allowed, (0, more), value=True), -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
        lses.append(scores.logsumexp(-1))
    output = torch.stack(outputs, -2).reshape(*query.shape[:-1], value.shape[-1])
    return output, torch.stack(lses, -1).reshape(query.shape[:-1])
