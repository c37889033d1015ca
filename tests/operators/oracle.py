"""Attention written from its definition, to judge every implementation by.

For each head and query the neighborhood is a plain list of `(key, row offset, column offset)`, made by Python loops
that build residue classes as lists of positions; nothing here is shared with `natten_ext`. The arithmetic is PyTorch
on the gathered keys, so autograd gives every order of derivative. Run in float64 it is the truth; run in a lower
precision it is "the same computation in plain PyTorch", which the error budget is measured against.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

Neighbors = tuple[tuple[tuple[int, int, int], ...], ...]
"""For every query (row-major), its keys as (key index, row offset, column offset); offsets are key minus query."""


def axis_neighbors(position: int, length: int, kernel: int, dilation: int) -> list[int]:
    """Positions that `position` attends to along one axis: `kernel` members of its residue class, kept inside it."""
    members = [p for p in range(length) if (p - position) % dilation == 0]
    if len(members) < kernel:
        raise ValueError(f"{length} positions at dilation {dilation} hold {len(members)} members, fewer than {kernel}")
    first = members.index(position) - kernel // 2
    while first < 0:
        first += 1
    while first + kernel > len(members):
        first -= 1
    return members[first : first + kernel]


@cache
def full_neighbors(queries: int, keys: int) -> Neighbors:
    """Every query attends to every key; there is no table, so offsets are zero."""
    return tuple(tuple((key, 0, 0) for key in range(keys)) for _ in range(queries))


@cache
def grid_neighbors(height: int, width: int, window: tuple[int, int]) -> Neighbors:
    """Every query attends to the keys with which it shares a cell of the grid."""
    result = []
    for y in range(height):
        for x in range(width):
            rows = [j for j in range(height) if j // window[0] == y // window[0]]
            columns = [i for i in range(width) if i // window[1] == x // window[1]]
            result.append(tuple((j * width + i, j - y, i - x) for j in rows for i in columns))
    return tuple(result)


@cache
def sliding_neighbors(height: int, width: int, kernel: tuple[int, int], dilation: tuple[int, int]) -> Neighbors:
    """Every query attends to a window that slides with it; offsets are in units of the dilation."""
    result = []
    for y in range(height):
        for x in range(width):
            rows = axis_neighbors(y, height, kernel[0], dilation[0])
            columns = axis_neighbors(x, width, kernel[1], dilation[1])
            result.append(
                tuple((j * width + i, (j - y) // dilation[0], (i - x) // dilation[1]) for j in rows for i in columns)
            )
    return tuple(result)


@cache
def pair_tables(neighbors: Neighbors, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every (query, key): whether it is a pair of the neighborhood, and its row and column offset (0 if not)."""
    allowed = torch.zeros(len(neighbors), keys, dtype=torch.bool)
    rows, columns = (torch.zeros(len(neighbors), keys, dtype=torch.int64) for _ in range(2))
    for query, entries in enumerate(neighbors):
        for key, row, column in entries:
            assert not allowed[query, key], "a key is listed twice"
            allowed[query, key], rows[query, key], columns[query, key] = True, row, column
    return allowed, rows, columns


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
) -> tuple[Tensor, Tensor]:
    """Attention of every query over its listed keys, all scores held at once, and the log-sum-exp of its scores.

    `query`, `key` and `value` are `(batch, *positions, heads, head_dim)`, `table` is `(heads, rows, columns)` with
    offset (0, 0) in its centre, and `neighbors` has one entry per head. The score "l2" is computed as defined, from
    differences, or with `expanded` as everybody computes it in practice: from products, less what softmax removes (the
    log-sum-exp is not that of the scores then).
    """
    query_tokens, key_tokens, value_tokens = (tensor.flatten(1, -3) for tensor in (query, key, value))
    outputs, lses = [], []
    for head, sets in enumerate(neighbors):
        allowed, rows, columns = pair_tables(sets, key_tokens.shape[1])
        q, k, v = (tokens[:, :, head] for tokens in (query_tokens, key_tokens, value_tokens))
        if score == "dot":
            scores = scale * (q @ k.transpose(1, 2))
        elif score == "l2" and expanded:
            scores = 2 * scale * (q @ k.transpose(1, 2)) - scale * k.square().sum(-1).unsqueeze(1)
        elif score == "l2":
            scores = -scale * (q.unsqueeze(2) - k.unsqueeze(1)).square().sum(-1)
        else:
            raise ValueError(f"score {score!r}")
        if table is not None:
            scores = scores + table[head, rows + table.shape[1] // 2, columns + table.shape[2] // 2]
        scores = scores.masked_fill(~allowed, -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
        lses.append(scores.logsumexp(-1))
    return torch.stack(outputs, -2).reshape(query.shape), torch.stack(lses, -1).reshape(query.shape[:-1])
