"""The forward: one program per tile of queries, head and image; it walks over the keys that the tile sees."""

from __future__ import annotations

import triton
import triton.language as tl

from .distances import score_terms
from .geometry import SIZES, empty, keys_of, own_tile
from .launch import Launch, Results, rows_of
from .places import as_queries, block_count, own_place
from .problem import QUERY
from .scores import block_of_keys, per_query
from .tables import head_table, padded_table
from .tiles import LN2, add_weighted, load_rows, number, scaled, store_column, store_rows, zero_rows


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, score_terms, value, output, base, log_sum, natural_lse, table, members,
    scale, heads, tiles, depth, height, width, window_z, window_y, window_x, table_planes, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """Online softmax over blocks of keys. Work per program: two products per block."""
    OWN: tl.constexpr = S.own
    lattice, box = own_tile(heads, tiles, members, depth, height, width, window_z, window_y, window_x, False, S)
    if empty(box):
        return
    scale = number(scale, S)
    table = head_table(table, lattice.head, table_planes, table_rows, table_columns, S)
    tile = own_place(box, S)
    queries = as_queries(tile, box, lattice, 1, S)
    q = load_rows(query, lattice, tile, False, S)
    q_term = per_query(score_terms, lattice, tile, S)

    # Columns: what a vector's layout is would decide that of the scores.
    highest = tl.full((OWN, 1), float("-inf"), S.accumulate)
    total = tl.zeros((OWN, 1), S.accumulate)
    o = zero_rows(OWN, S)
    halo = keys_of(box, lattice, S)
    for block in range(block_count(halo, S)):
        _, v, scores = block_of_keys(key, value, score_terms, q, q_term, queries, table, scale, lattice, halo, block, S)
        higher = tl.maximum(highest, tl.max(scores, 1, keep_dims=True))
        # A row may see nothing in this block, and nothing yet.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - shift)
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, 1, keep_dims=True)
        o = add_weighted(scaled(o, decay, S), weights, v, S)
        highest = higher

    # Of a query that sees minus infinity only, the sum is zero, and the result NaN.
    total = tl.where(tile.valid[:, None], total, 1.0)
    store_rows(output, lattice, tile, False, scaled(o, 1 / total, S), S)
    store_column(base, lattice, tile, highest, False, S)
    log_sum_of = tl.log2(total)
    store_column(log_sum, lattice, tile, log_sum_of, False, S)
    if natural_lse is not None:
        # Scores are true, those of l2 as well (``distances.py``).
        store_column(natural_lse, lattice, tile, (highest + log_sum_of) * LN2, False, S)


def forward(launch: Launch) -> Results:
    """``(output, lse, natural_lse)``; see ``natten_ext.orders``."""
    operands = launch.operands
    output = launch.like(operands.query)
    lse = launch.empty((2, *launch.row_shape))
    natural_lse = launch.empty(launch.row_shape) if operands.return_lse else None
    maps = launch.query, launch.key, score_terms(launch), rows_of(operands.value), rows_of(output)
    launch.run(forward_kernel, "forward", QUERY, *maps, *lse, natural_lse, padded_table(launch))
    return output, lse, natural_lse
