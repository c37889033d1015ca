"""The forward: one program per tile of queries, head and image; it walks over the keys that the tile sees."""

from __future__ import annotations

import triton
import triton.language as tl

from .distances import score_terms
from .geometry import (
    SIZES,
    as_keys,
    as_queries,
    block_count,
    block_place,
    empty,
    keys_of,
    own_place,
    own_tile,
)
from .launch import Launch, rows_of
from .problem import QUERY
from .scores import logits, per_key, per_query
from .tables import head_table, padded_table
from .tiles import (
    add_weighted,
    first_row,
    load_rows,
    number,
    row_index,
    scaled,
    store_column,
    store_rows,
    zero_rows,
)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, score_terms, value, output, base, log_sum, table, members,
    scale, heads, tiles, height, width, window_y, window_x, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """Online softmax over blocks of keys. Work per program: two products per block."""
    OWN: tl.constexpr = S.own_h * S.own_w
    batch, head, lattice, box = own_tile(heads, tiles, members, height, width, window_y, window_x, False, S)
    if empty(box):
        return
    scale = number(scale, S)
    if table is not None:
        table = head_table(table, head, table_rows, table_columns)
    place = own_place(box, S)
    queries = as_queries(place, box, lattice, 1, S)
    first = first_row(batch, head, heads, height, width)
    index = row_index(width, lattice, place)
    q = load_rows(query, batch, head, lattice, place, S)
    q_term = per_query(score_terms, first, index, place.valid, S)

    # Columns: what a vector's layout is would decide that of the scores.
    highest = tl.full((OWN, 1), float("-inf"), S.accumulate)
    total = tl.zeros((OWN, 1), S.accumulate)
    rows = zero_rows(OWN, S)
    reach = keys_of(box, lattice, S)
    for block in range(block_count(reach, S)):
        there = block_place(reach, block, S)
        keys = as_keys(there, 0)
        k = load_rows(key, batch, head, lattice, there, S)
        v = load_rows(value, batch, head, lattice, there, S)
        k_term = per_key(score_terms, batch, head, heads, height, width, lattice, there, 0, S)
        scores = logits(q, k, q_term, k_term, queries, keys, table, scale, lattice, False, S)
        higher = tl.maximum(highest, tl.max(scores, 1, keep_dims=True))
        # A row may see nothing in this block, and nothing yet.
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - origin)
        decay = tl.exp2(highest - origin)
        total = total * decay + tl.sum(weights, 1, keep_dims=True)
        rows = add_weighted(scaled(rows, decay, S), weights, v, S)
        highest = higher

    # Of a query that sees minus infinity only, the sum is zero, and the result NaN.
    total = tl.where(place.valid[:, None], total, 1.0)
    store_rows(output, batch, head, lattice, place, scaled(rows, 1 / total, S), S)
    store_column(base + first, index, place.valid, highest)
    store_column(log_sum + first, index, place.valid, tl.log2(total))


def forward(operands):
    """``(output, lse)``; see ``natten_ext.orders``."""
    launch = Launch(operands)
    query = operands.query
    output = query.new_empty(query.shape)
    lse = query.new_empty((2, *launch.row_shape), dtype=launch.accumulate)
    maps = launch.query, launch.key, score_terms(launch), rows_of(operands.value), rows_of(output)
    launch.run(forward_kernel, "forward", QUERY, *maps, *lse, padded_table(launch))
    return output, lse
