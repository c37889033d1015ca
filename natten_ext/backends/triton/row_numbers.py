"""Numbers of each row that the passes over queries leave to the others.

They lie side by side, ``(batch, heads, height, width, 4)`` in the backward and 8 in the double backward, for a pass
over keys wants those of a block along axis 1 of the scores: every thread loads them for each of its columns.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import row_index

FIRST = tl.constexpr(4)  # numbers of a row in the backward
SECOND = tl.constexpr(8)  # in the double backward


class RowNumbers(NamedTuple):
    """L in two parts, D, and the term that the score l2 adds for a query."""

    base: object
    log_sum: object
    d: object
    term: object


class SecondNumbers(NamedTuple):
    """What the double backward has besides: r, t, and the term that the score l2 adds to X."""

    r: object
    t: object
    term: object


@triton.jit
def store_numbers(numbers, lattice, place, columns, START: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr):
    """Write some numbers of every row, each given as a column, from number ``START`` of ``COUNT`` on. The last of the
    columns is of l2 only."""
    index = row_index(lattice, place, False, S).to(tl.int64) * COUNT
    for i in tl.static_range(len(columns)):
        if S.l2 or i < len(columns) - 1:
            addresses = numbers + lattice.first_query * COUNT + (START + i) + index[:, None]
            tl.store(addresses, columns[i], mask=place.valid[:, None])


@triton.jit
def _load_four(addresses, S: tl.constexpr):
    """As an operation on each element: of loads, Triton chooses a layout of their own."""
    if S.interpreted or S.accumulate == tl.float64:
        return tl.load(addresses), tl.load(addresses + 1), tl.load(addresses + 2), tl.load(addresses + 3)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];",
            "=f,=f,=f,=f,l",
            [addresses.to(tl.int64)],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            True,
            1,
        )


@triton.jit
def _addresses(numbers, lattice, place, COUNT: tl.constexpr, AXIS: tl.constexpr, S: tl.constexpr):
    index = row_index(lattice, place, False, S).to(tl.int64) * COUNT
    return numbers + lattice.first_query * COUNT + tl.expand_dims(index, AXIS)


@triton.jit
def load_numbers(numbers, lattice, place, COUNT: tl.constexpr, AXIS: tl.constexpr, S: tl.constexpr):
    """Numbers of queries, all of which must exist, along axis 1 - AXIS of the scores."""
    addresses = _addresses(numbers, lattice, place, COUNT, AXIS, S)
    base, log_sum, d, term = _load_four(addresses, S)
    return RowNumbers(base, log_sum, d, term)


@triton.jit
def load_second_numbers(numbers, lattice, place, AXIS: tl.constexpr, S: tl.constexpr):
    """Likewise, those that only the double backward has."""
    addresses = _addresses(numbers, lattice, place, SECOND, AXIS, S) + FIRST
    r, t, term, _ = _load_four(addresses, S)
    return SecondNumbers(r, t, term)
