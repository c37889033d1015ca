"""The double backward: the same passes as the backward.

The formulas are the centred ones at the end of docs/double_backward.md: D, r and t are sums of the same unrounded
weights, and what is constant along a row is subtracted before anything is rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distances import score_terms, x_terms
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
from .row_numbers import FIRST, SECOND, RowNumbers, SecondNumbers, load_numbers, load_second_numbers, store_numbers
from .scores import (
    logits_and_x,
    pair_products,
    per_key,
    per_query,
    second_score_gradient,
    weights_of_queries,
)
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
    wide,
    zero_rows,
    zero_totals,
    zeros,
)


@triton.jit(do_not_specialize=SIZES)
def double_query_kernel(
    cot_query, cot_key, x_terms, cot_value, cot_table, grad_output, query, key, score_terms, value, output,
    base, log_sum, numbers, grad_grad_output, grad_query, table, members,
    scale, heads, tiles, height, width, window_y, window_x, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """Two walks over the keys. The first gives D, r and t (up to five products per block); the second the gradients of
    dO and, unless ``grad_query`` is None, of Q (up to nine)."""
    OWN: tl.constexpr = S.own_h * S.own_w
    batch, head, lattice, box = own_tile(heads, tiles, members, height, width, window_y, window_x, False, S)
    if empty(box):
        return
    scale = number(scale, S)
    if table is not None:
        table = head_table(table, head, table_rows, table_columns)
    if cot_table is not None:
        cot_table = head_table(cot_table, head, table_rows, table_columns, 2)
    place = own_place(box, S)
    queries = as_queries(place, box, lattice, 1, S)
    first = first_row(batch, head, heads, height, width)
    index = row_index(width, lattice, place)
    origin = load_column(base + first, index, place.valid)
    spread = load_column(log_sum + first, index, place.valid)
    q = load_rows(query, batch, head, lattice, place, S)
    q_term = per_query(score_terms, first, index, place.valid, S)
    q_x_term = per_query(x_terms, first, index, place.valid, S)
    do = load_rows(grad_output, batch, head, lattice, place, S)
    gq = load_rows(cot_query, batch, head, lattice, place, S) if cot_query is not None else None
    reach = keys_of(box, lattice, S)

    # From the rounded O, D is near enough to be subtracted from dP; the rest follows from the sums.
    near_d = row_products(do, load_rows(output, batch, head, lattice, place, S), OWN, S)
    rest = zeros(OWN, 1, S.accumulate)
    r = zeros(OWN, 1, S.accumulate)
    t = zeros(OWN, 1, S.accumulate)
    for block in tl.range(block_count(reach, S), disable_licm=S.streamed or wide(S.chunks)):
        there = block_place(reach, block, S)
        keys = as_keys(there, 0)
        k = load_rows(key, batch, head, lattice, there, S)
        v = load_rows(value, batch, head, lattice, there, S)
        gk = load_rows(cot_key, batch, head, lattice, there, S) if cot_key is not None else None
        gv = load_rows(cot_value, batch, head, lattice, there, S) if cot_value is not None else None
        k_term = per_key(score_terms, batch, head, heads, height, width, lattice, there, 0, S)
        k_x_term = per_key(x_terms, batch, head, heads, height, width, lattice, there, 0, S)
        scores, x = logits_and_x(
            q, k, q_term, k_term, gq, gk, q_x_term, k_x_term, queries, keys, table, cot_table, scale, lattice, False, S
        )
        weights = tl.exp2(scores - origin - spread)
        d_weights = pair_products(do, v, False, S) - near_d
        rest += tl.sum(weights * d_weights, 1, keep_dims=True)
        r += tl.sum(weights * x, 1, keep_dims=True)
        inner = x * d_weights
        if gv is not None:
            inner += pair_products(do, gv, False, S)
        t += tl.sum(weights * inner, 1, keep_dims=True)
    d = near_d + rest
    t -= r * rest
    store_numbers(numbers, first, index, place.valid, RowNumbers(origin, spread, d, q_term), 0, SECOND, S)
    store_numbers(numbers, first, index, place.valid, SecondNumbers(r, t, q_x_term), FIRST, SECOND, S)

    d_do = zero_rows(OWN, S)
    dq = zero_rows(OWN, S)
    rest = zero_totals(OWN, S)
    for block in tl.range(block_count(reach, S), disable_licm=S.streamed or wide(S.chunks)):
        there = block_place(reach, block, S)
        keys = as_keys(there, 0)
        k = load_rows(key, batch, head, lattice, there, S)
        v = load_rows(value, batch, head, lattice, there, S)
        gk = load_rows(cot_key, batch, head, lattice, there, S) if cot_key is not None else None
        gv = load_rows(cot_value, batch, head, lattice, there, S) if cot_value is not None else None
        k_term = per_key(score_terms, batch, head, heads, height, width, lattice, there, 0, S)
        k_x_term = per_key(x_terms, batch, head, heads, height, width, lattice, there, 0, S)
        scores, x = logits_and_x(
            q, k, q_term, k_term, gq, gk, q_x_term, k_x_term, queries, keys, table, cot_table, scale, lattice, False, S
        )
        weights = tl.exp2(scores - origin - spread)
        x -= r
        d_do = add_weighted(d_do, rounded(weights * x, v, S), v, S)
        if gv is not None:
            d_do = add_weighted(d_do, rounded(weights, gv, S), gv, S)
        if grad_query is not None:
            d_weights = pair_products(do, v, False, S) - d
            g = pair_products(do, gv, False, S) if gv is not None else None
            d_scores = rounded(second_score_gradient(weights, x, d_weights, g, t), k, S)
            dq = add_weighted(dq, d_scores, k, S)
            rest = add_totals(rest, d_scores, S)
            if gk is not None:
                dq = add_weighted(dq, rounded(weights * d_weights, gk, S), gk, S)
    store_rows(grad_grad_output, batch, head, lattice, place, d_do, S)
    if grad_query is not None:
        near = load_rows(key, batch, head, lattice, own_keys(place, lattice), S)
        dq = subtract_scaled(dq, totals_of(rest), near, S)
        store_rows(grad_query, batch, head, lattice, place, scaled(dq, scale, S), S)


@triton.jit(do_not_specialize=SIZES)
def double_key_kernel(
    cot_query, cot_key, x_terms, cot_value, cot_table, grad_output, query, key, score_terms, value,
    numbers, grad_key, grad_value, table, members,
    scale, heads, tiles, height, width, window_y, window_x, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """Gradients of K and V, gathered from the queries that see a tile of keys: up to eight products per block."""
    OWN: tl.constexpr = S.own_h * S.own_w
    batch, head, lattice, box = own_tile(heads, tiles, members, height, width, window_y, window_x, True, S)
    if empty(box):
        return
    scale = number(scale, S)
    if table is not None:
        table = head_table(table, head, table_rows, table_columns)
    if cot_table is not None:
        cot_table = head_table(cot_table, head, table_rows, table_columns, 2)
    place = own_place(box, S)
    keys = as_keys(place, 1)
    first = first_row(batch, head, heads, height, width)
    k = load_rows(key, batch, head, lattice, place, S)
    v = load_rows(value, batch, head, lattice, place, S)
    gk = load_rows(cot_key, batch, head, lattice, place, S) if cot_key is not None else None
    gv = load_rows(cot_value, batch, head, lattice, place, S) if cot_value is not None else None
    k_term = per_key(score_terms, batch, head, heads, height, width, lattice, place, 1, S)
    k_x_term = per_key(x_terms, batch, head, heads, height, width, lattice, place, 1, S)
    dk = zero_rows(OWN, S)
    dv = zero_rows(OWN, S)
    d_terms = zero_totals(OWN, S)
    first_d_terms = zero_totals(OWN, S)
    reach = queries_of(box, lattice, S)
    for block in tl.range(block_count(reach, S), disable_licm=S.streamed or wide(S.chunks)):
        there = block_place(reach, block, S)
        queries = as_queries(there, reach, lattice, 0, S)
        index = row_index(width, lattice, not_beyond(there, reach, S))
        row = load_numbers(numbers, first, index, SECOND, 0, S)
        second = load_second_numbers(numbers, first, index, 0, S)
        q = load_rows(query, batch, head, lattice, there, S)
        gq = load_rows(cot_query, batch, head, lattice, there, S) if cot_query is not None else None
        do = load_rows(grad_output, batch, head, lattice, there, S)
        scores, x = logits_and_x(
            q, k, row.term, k_term, gq, gk, second.term, k_x_term, queries, keys, table, cot_table, scale, lattice,
            True, S,
        )  # fmt: skip
        weights = weights_of_queries(scores, row, table, there, S)
        x -= second.r
        dv = add_weighted(dv, rounded(weights * x, do, S), do, S)
        d_weights = pair_products(do, v, True, S) - row.d
        g = pair_products(do, gv, True, S) if gv is not None else None
        d_scores = rounded(second_score_gradient(weights, x, d_weights, g, second.t), q, S)
        dk = add_weighted(dk, d_scores, q, S)
        first_d_scores = rounded(weights * d_weights, q, S)
        if gq is not None:
            dk = add_weighted(dk, first_d_scores, gq, S)
        if S.l2:
            d_terms = add_totals(d_terms, d_scores, S)
            first_d_terms = add_totals(first_d_terms, first_d_scores, S)
    if S.l2:
        dk = subtract_scaled(dk, totals_of(d_terms), k, S)
        if gk is not None:
            dk = subtract_scaled(dk, totals_of(first_d_terms), gk, S)
    store_rows(grad_key, batch, head, lattice, place, scaled(dk, scale, S), S)
    store_rows(grad_value, batch, head, lattice, place, dv, S)


def double_backward(operands):
    """Gradients of ``(grad_output, query, key, value, bias)``; see ``natten_ext.orders``."""
    query, key, value = operands.query, operands.key, operands.value
    lse, needs = operands.lse, operands.needs
    if not any(needs):
        return asked(query, (None,) * 5, needs)
    launch = Launch(operands)
    table = padded_table(launch, operands.cot_bias)
    cot_table = None if operands.cot_bias is None else table
    gq, gk, gv = (rows_of(tensor) for tensor in (operands.cot_query, operands.cot_key, operands.cot_value))
    cots = gq, gk, x_terms(launch, gq, gk), gv, cot_table
    do, v, out = (rows_of(tensor) for tensor in (operands.grad_output, value, operands.output))
    maps = do, launch.query, launch.key, score_terms(launch), v
    numbers = lse.new_empty((*launch.row_shape, SECOND.value))
    grad_grad_output = query.new_empty(query.shape)
    grad_query = query.new_empty(query.shape) if needs[1] else None
    launch.run(
        double_query_kernel, "double_query", QUERY, *cots, *maps, out, *lse, numbers,
        rows_of(grad_grad_output), rows_of(grad_query) if needs[1] else None, table,
    )  # fmt: skip
    grad_key, grad_value, grad_bias = None, None, None
    if needs[2] or needs[3]:
        grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
        launch.run(
            double_key_kernel, "double_key", KEY, *cots, *maps, numbers, rows_of(grad_key), rows_of(grad_value), table
        )  # fmt: skip
    if needs[4]:
        grad_bias = table_gradient(launch, "double_table", table, cots, maps, numbers)
    return asked(query, (grad_grad_output, grad_query, grad_key, grad_value, grad_bias), needs)
