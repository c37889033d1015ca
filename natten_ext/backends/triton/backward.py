"""The backward: a pass over tiles of queries, one over tiles of keys, and one for the table (table_gradient.py).

The formulas are in docs/double_backward.md. Nothing is added up across programs: the gradient of a key is gathered
by the program that owns it, from the queries that see it.
"""

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
    not_beyond,
    own_keys,
    own_place,
    own_tile,
    queries_of,
)
from .launch import Launch, asked, rows_of
from .problem import KEY, QUERY
from .row_numbers import FIRST, RowNumbers, load_numbers, store_numbers
from .scores import logits, pair_products, per_key, per_query, weights_of_queries
from .table_gradient import table_gradient
from .tables import head_table, padded_table
from .tiles import (
    add_totals,
    add_weighted,
    first_row,
    load_column,
    load_rows,
    number,
    rounded,
    row_index,
    row_products,
    scaled,
    store_rows,
    subtract_scaled,
    totals_of,
    zero_rows,
    zero_totals,
)


@triton.jit(do_not_specialize=SIZES)
def backward_query_kernel(
    grad_output, query, key, score_terms, value, output, base, log_sum, numbers, grad_query, table, members,
    scale, heads, tiles, height, width, window_y, window_x, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """D for the other passes, and dQ unless ``grad_query`` is None: three products per block.

    D = rowsum(dO * O) has the rounding of O. So the sum of a row of dS, which should be zero, is what D lacks. And dQ
    is taken from keys relative to the row's own: what is left in the sum then counts keys' differences only.
    """
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
    origin = load_column(base + first, index, place.valid)
    spread = load_column(log_sum + first, index, place.valid)
    q = load_rows(query, batch, head, lattice, place, S)
    q_term = per_query(score_terms, first, index, place.valid, S)
    do = load_rows(grad_output, batch, head, lattice, place, S)
    near_d = row_products(do, load_rows(output, batch, head, lattice, place, S), OWN, S)
    rest = zero_totals(OWN, S)
    dq = zero_rows(OWN, S)
    reach = keys_of(box, lattice, S)
    for block in range(block_count(reach, S)):
        there = block_place(reach, block, S)
        keys = as_keys(there, 0)
        k = load_rows(key, batch, head, lattice, there, S)
        v = load_rows(value, batch, head, lattice, there, S)
        k_term = per_key(score_terms, batch, head, heads, height, width, lattice, there, 0, S)
        scores = logits(q, k, q_term, k_term, queries, keys, table, scale, lattice, False, S)
        weights = tl.exp2(scores - origin - spread)
        d_scores = rounded(weights * (pair_products(do, v, False, S) - near_d), k, S)
        rest = add_totals(rest, d_scores, S)
        if grad_query is not None:
            dq = add_weighted(dq, d_scores, k, S)
    found = RowNumbers(origin, spread, near_d + totals_of(rest), q_term)
    store_numbers(numbers, first, index, place.valid, found, 0, FIRST, S)
    if grad_query is not None:
        near = load_rows(key, batch, head, lattice, own_keys(place, lattice), S)
        dq = subtract_scaled(dq, totals_of(rest), near, S)
        store_rows(grad_query, batch, head, lattice, place, scaled(dq, scale, S), S)


@triton.jit(do_not_specialize=SIZES)
def backward_key_kernel(
    grad_output, query, key, score_terms, value, numbers, grad_key, grad_value, table, members,
    scale, heads, tiles, height, width, window_y, window_x, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """dK and dV, gathered from the queries that see a tile of keys: four products per block."""
    OWN: tl.constexpr = S.own_h * S.own_w
    batch, head, lattice, box = own_tile(heads, tiles, members, height, width, window_y, window_x, True, S)
    if empty(box):
        return
    scale = number(scale, S)
    if table is not None:
        table = head_table(table, head, table_rows, table_columns)
    place = own_place(box, S)
    keys = as_keys(place, 1)
    first = first_row(batch, head, heads, height, width)
    k = load_rows(key, batch, head, lattice, place, S)
    v = load_rows(value, batch, head, lattice, place, S)
    k_term = per_key(score_terms, batch, head, heads, height, width, lattice, place, 1, S)
    dk = zero_rows(OWN, S)
    dv = zero_rows(OWN, S)
    d_terms = zero_totals(OWN, S)
    reach = queries_of(box, lattice, S)
    for block in range(block_count(reach, S)):
        there = block_place(reach, block, S)
        queries = as_queries(there, reach, lattice, 0, S)
        q = load_rows(query, batch, head, lattice, there, S)
        do = load_rows(grad_output, batch, head, lattice, there, S)
        row = load_numbers(numbers, first, row_index(width, lattice, not_beyond(there, reach, S)), FIRST, 0, S)
        scores = logits(q, k, row.term, k_term, queries, keys, table, scale, lattice, True, S)
        weights = weights_of_queries(scores, row, table, there, S)
        dv = add_weighted(dv, weights, do, S)
        d_scores = rounded(weights * (pair_products(do, v, True, S) - row.d), q, S)
        dk = add_weighted(dk, d_scores, q, S)
        if S.l2:
            d_terms = add_totals(d_terms, d_scores, S)
    dk = scaled(subtract_scaled(dk, totals_of(d_terms), k, S) if S.l2 else dk, scale, S)
    store_rows(grad_key, batch, head, lattice, place, dk, S)
    store_rows(grad_value, batch, head, lattice, place, dv, S)


def backward(operands):
    """``(grad_query, grad_key, grad_value, grad_bias)``; see ``natten_ext.orders``."""
    query, key, value = operands.query, operands.key, operands.value
    lse, needs = operands.lse, operands.needs
    launch = Launch(operands)
    grad_query, grad_key, grad_value, grad_bias = None, None, None, None
    if not any(needs):
        return asked(query, (None,) * 4, needs)
    q, k, terms = launch.query, launch.key, score_terms(launch)
    do, v, out = (rows_of(tensor) for tensor in (operands.grad_output, value, operands.output))
    table = padded_table(launch)
    numbers = lse.new_empty((*launch.row_shape, FIRST.value))
    dq = None
    if needs[0]:
        grad_query = query.new_empty(query.shape)
        dq = rows_of(grad_query)
    launch.run(backward_query_kernel, "backward_query", QUERY, do, q, k, terms, v, out, *lse, numbers, dq, table)
    if needs[1] or needs[2]:
        grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
        dk, dv = rows_of(grad_key), rows_of(grad_value)
        launch.run(backward_key_kernel, "backward_key", KEY, do, q, k, terms, v, numbers, dk, dv, table)
    if needs[3]:
        grad_bias = table_gradient(launch, "table", table, (None,) * 5, (do, q, k, terms, v), numbers)
    return asked(query, (grad_query, grad_key, grad_value, grad_bias), needs)
