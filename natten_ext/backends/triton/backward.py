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
    own_keys,
    own_place,
    own_tile,
    queries_of,
)
from .launch import Launch, asked, rows_of
from .problem import KEY, QUERY
from .scores import logits, pair_products, per_key, per_query, table_centre
from .table_gradient import table_gradient
from .tiles import (
    add_totals,
    add_weighted,
    load_rows,
    number,
    rounded,
    row_numbers,
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
    grad_output, query, key, score_terms, value, output, base, log_sum, row_means, grad_query, table, members,
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
        table = table_centre(table, head, table_rows, table_columns)
    place = own_place(box, S)
    queries = as_queries(place, lattice, table_columns, 1, S)
    numbers = row_numbers(batch, head, heads, height, width, lattice, place)
    origin = tl.load(base + numbers, mask=place.valid, other=0.0)[:, None]
    spread = tl.load(log_sum + numbers, mask=place.valid, other=0.0)[:, None]
    q = load_rows(query, batch, head, lattice, place, S)
    q_term = per_query(score_terms, numbers, place.valid, 1, S)
    do = load_rows(grad_output, batch, head, lattice, place, S)
    mean = row_products(do, load_rows(output, batch, head, lattice, place, S), OWN, S)
    rest = zero_totals(OWN, S)
    dq = zero_rows(OWN, S)
    reach = keys_of(box, lattice, S)
    for block in range(block_count(reach, S)):
        there = block_place(reach, block, S)
        keys = as_keys(there, table_columns, 0)
        k = load_rows(key, batch, head, lattice, there, S)
        v = load_rows(value, batch, head, lattice, there, S)
        k_term = per_key(score_terms, batch, head, heads, height, width, lattice, there, reach, 0, S)
        scores = logits(q, k, q_term, k_term, queries, keys, table, scale, lattice, False, S)
        weights = tl.exp2(scores - origin - spread)
        d_scores = rounded(weights * (pair_products(do, v, False, S) - mean[:, None]), k, S)
        rest = add_totals(rest, d_scores, S)
        if grad_query is not None:
            dq = add_weighted(dq, d_scores, k, S)
    tl.store(row_means + numbers, mean + totals_of(rest), mask=place.valid)
    if grad_query is not None:
        near = load_rows(key, batch, head, lattice, own_keys(place, lattice), S)
        dq = subtract_scaled(dq, totals_of(rest), near, S)
        store_rows(grad_query, batch, head, lattice, place, scaled(dq, scale, S), S)


@triton.jit(do_not_specialize=SIZES)
def backward_key_kernel(
    grad_output, query, key, score_terms, value, base, log_sum, row_means, grad_key, grad_value, table, members,
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
        table = table_centre(table, head, table_rows, table_columns)
    place = own_place(box, S)
    keys = as_keys(place, table_columns, 1)
    k = load_rows(key, batch, head, lattice, place, S)
    v = load_rows(value, batch, head, lattice, place, S)
    k_term = per_key(score_terms, batch, head, heads, height, width, lattice, place, box, 1, S)
    dk = zero_rows(OWN, S)
    dv = zero_rows(OWN, S)
    d_terms = zero_totals(OWN, S)
    reach = queries_of(box, lattice, S)
    for block in range(block_count(reach, S)):
        there = block_place(reach, block, S)
        queries = as_queries(there, lattice, table_columns, 0, S)
        q = load_rows(query, batch, head, lattice, there, S)
        do = load_rows(grad_output, batch, head, lattice, there, S)
        numbers = row_numbers(batch, head, heads, height, width, lattice, there)
        origin = tl.load(base + numbers, mask=there.valid, other=0.0)[None, :]
        spread = tl.load(log_sum + numbers, mask=there.valid, other=0.0)[None, :]
        mean = tl.load(row_means + numbers, mask=there.valid, other=0.0)[None, :]
        q_term = per_query(score_terms, numbers, there.valid, 0, S)
        scores = logits(q, k, q_term, k_term, queries, keys, table, scale, lattice, True, S)
        weights = tl.exp2(scores - origin - spread)
        dv = add_weighted(dv, weights, do, S)
        d_scores = rounded(weights * (pair_products(do, v, True, S) - mean), q, S)
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
    row_means = lse.new_empty(launch.row_shape)
    dq = None
    if needs[0]:
        grad_query = query.new_empty(query.shape)
        dq = rows_of(grad_query)
    launch.run(
        backward_query_kernel, "backward_query", QUERY, do, q, k, terms, v, out, *lse, row_means, dq, launch.table
    )
    if needs[1] or needs[2]:
        grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
        dk, dv = rows_of(grad_key), rows_of(grad_value)
        launch.run(backward_key_kernel, "backward_key", KEY, do, q, k, terms, v, *lse, row_means, dk, dv, launch.table)
    if needs[3]:
        grad_bias = table_gradient(launch, "table", operands.bias, (None,) * 5, do, q, k, terms, v, lse, row_means)
    return asked(query, (grad_query, grad_key, grad_value, grad_bias), needs)
