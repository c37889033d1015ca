"""Scores of a tile against a block, in base 2, in either orientation: the part that every pass shares."""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import visible
from .tiles import LOG2E


@triton.jit
def table_entries(table, queries, keys, see, S: tl.constexpr):
    """Entries of a relative position table, for every pair; ``table`` is the address of the offset zero."""
    return tl.load(table + (keys.cell - queries.cell), mask=see, other=0.0).to(S.accumulate)


@triton.jit
def table_centre(table, head, table_rows, table_columns):
    """Address of the offset zero in a head's table."""
    return table + head * (table_rows * table_columns) + table_rows // 2 * table_columns + table_columns // 2


@triton.jit
def logits(products, key_bias, queries, keys, table, scale, lattice, S: tl.constexpr):
    """Scores times log2(e) from the products q.k; minus infinity where a query does not see a key.

    ``key_bias`` is -scale/2 * |k|^2 per key, spread along the queries (used for the score l2 only).
    """
    see = visible(queries, keys, lattice, S)
    scores = products * (scale * LOG2E)
    if S.l2:
        scores += key_bias * LOG2E
    if table is not None:
        scores += table_entries(table, queries, keys, see, S) * LOG2E
    return tl.where(see, scores, float("-inf"))
