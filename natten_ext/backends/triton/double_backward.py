"""The double backward: the same passes as the backward.

The formulas are the centred ones at the end of docs/double_backward.md: D, r and t are sums of the same unrounded
weights, and what is constant along a row is subtracted before anything is rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distances import score_terms, x_terms
from .geometry import SIZES, empty, keys_of, own_tile, queries_of, turn_of
from .launch import Launch, Results, rows_of
from .places import as_keys, as_queries, block_count, block_place, not_beyond, own_place, steps_of
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
from .tables import head_table, padded_table, table_in_turn
from .tiles import (
    add_totals,
    add_weighted,
    load_column,
    load_rows,
    number,
    rounded,
    row_products,
    scaled,
    store_about_own_keys,
    store_column,
    store_rows,
    subtract_scaled,
    totals_of,
    wide,
    zero_rows,
    zero_totals,
    zeros,
)


@triton.jit
def _weights_and_x(
    q, gq, row, q_x_term, k, gk, score_terms, x_terms, queries, there, table, cot_table, scale, lattice, S: tl.constexpr
):
    """P and X of a tile of queries and a block of keys."""
    k_term = per_key(score_terms, lattice, there, 0, S)
    k_x_term = per_key(x_terms, lattice, there, 0, S)
    scores, x = logits_and_x(
        q, k, row.term, k_term, gq, gk, q_x_term, k_x_term, queries, as_keys(there, 0), table, cot_table, scale,
        False, S,
    )  # fmt: skip
    return tl.exp2(scores - row.base - row.log_sum), x


@triton.jit(do_not_specialize=SIZES)
def double_query_kernel(
    cot_query, cot_key, x_terms, cot_value, cot_table, grad_output, grad_lse, query, key, score_terms, value, output,
    base, log_sum, numbers, grad_grad_output, grad_grad_lse, grad_query, table, members,
    scale, heads, tiles, depth, height, width, window_z, window_y, window_x, table_planes, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """Two walks over the keys. The first gives r and, where others need them, t and D less the gradient of the
    log-sum-exp (up to five products per block); the second the gradients of dO and of Q (up to nine).

    What is None is not asked for. With neither ``numbers`` nor ``grad_query`` nothing depends on dO: tangents alone.
    """
    OWN: tl.constexpr = S.own
    SECOND_ORDER: tl.constexpr = numbers is not None or grad_query is not None
    lattice, box = own_tile(heads, tiles, members, depth, height, width, window_z, window_y, window_x, False, S)
    if empty(box):
        return
    scale = number(scale, S)
    table = head_table(table, lattice.head, table_planes, table_rows, table_columns, S)
    cot_table = head_table(cot_table, lattice.head, table_planes, table_rows, table_columns, S, 2)
    tile = own_place(box, S)
    queries = as_queries(tile, box, lattice, 1, S)
    base = load_column(base, lattice, tile, S)
    log_sum = load_column(log_sum, lattice, tile, S)
    q = load_rows(query, lattice, tile, False, S)
    q_term = per_query(score_terms, lattice, tile, S)
    q_x_term = per_query(x_terms, lattice, tile, S)
    gq = load_rows(cot_query, lattice, tile, False, S)
    halo = keys_of(box, lattice, S)

    near_d = zeros(OWN, 1, S.accumulate)
    if SECOND_ORDER:
        do = load_rows(grad_output, lattice, tile, False, S)
        # From the rounded O, D is near enough to be subtracted from dP; the rest follows from the sums.
        near_d = row_products(do, load_rows(output, lattice, tile, False, S), OWN, S)
    row = RowNumbers(base, log_sum, near_d, q_term)
    rest = zeros(OWN, 1, S.accumulate)
    r = zeros(OWN, 1, S.accumulate)
    t = zeros(OWN, 1, S.accumulate)
    for block in tl.range(block_count(halo, S), disable_licm=S.streamed or wide(S.chunks)):
        there = block_place(halo, block, S)
        k = load_rows(key, lattice, there, True, S)
        v = load_rows(value, lattice, there, True, S) if SECOND_ORDER else None
        gk = load_rows(cot_key, lattice, there, True, S)
        gv = load_rows(cot_value, lattice, there, True, S) if SECOND_ORDER else None
        weights, x = _weights_and_x(
            q, gq, row, q_x_term, k, gk, score_terms, x_terms, queries, there, table, cot_table, scale, lattice, S
        )
        if SECOND_ORDER:
            c = pair_products(do, v, False, S) - row.d
            rest += tl.sum(weights * c, 1, keep_dims=True)
        r += tl.sum(weights * x, 1, keep_dims=True)
        if SECOND_ORDER:
            inner = x * c
            if gv is not None:
                inner += pair_products(do, gv, False, S)
            t += tl.sum(weights * inner, 1, keep_dims=True)
    if SECOND_ORDER:
        d = row.d + rest
        t -= r * rest
        if grad_lse is not None:
            dl = load_column(grad_lse, lattice, tile, S)
            d -= dl
        row = RowNumbers(base, log_sum, d, q_term)
    if numbers is not None:
        store_numbers(numbers, lattice, tile, row, 0, SECOND, S)
        store_numbers(numbers, lattice, tile, SecondNumbers(r, t, q_x_term), FIRST, SECOND, S)
    if grad_grad_lse is not None:
        store_column(grad_grad_lse, lattice, tile, r, False, S)

    if grad_grad_output is not None or grad_query is not None:
        d_do = zero_rows(OWN, S)
        dq = zero_rows(OWN, S)
        sb_sums = zero_totals(OWN, S)
        for block in tl.range(block_count(halo, S), disable_licm=S.streamed or wide(S.chunks)):
            there = block_place(halo, block, S)
            k = load_rows(key, lattice, there, True, S)
            v = load_rows(value, lattice, there, True, S)
            gk = load_rows(cot_key, lattice, there, True, S)
            gv = load_rows(cot_value, lattice, there, True, S)
            weights, x = _weights_and_x(
                q, gq, row, q_x_term, k, gk, score_terms, x_terms, queries, there, table, cot_table, scale, lattice, S
            )
            y = x - r
            if grad_grad_output is not None:
                d_do = add_weighted(d_do, rounded(weights * y, v, S), v, S)
                if gv is not None:
                    d_do = add_weighted(d_do, rounded(weights, gv, S), gv, S)
            if grad_query is not None:
                c = pair_products(do, v, False, S) - row.d
                g = pair_products(do, gv, False, S) if gv is not None else None
                sb = rounded(second_score_gradient(weights, y, c, g, t), k, S)
                dq = add_weighted(dq, sb, k, S)
                sb_sums = add_totals(sb_sums, sb, S)
                if gk is not None:
                    dq = add_weighted(dq, rounded(weights * c, gk, S), gk, S)
        if grad_grad_output is not None:
            store_rows(grad_grad_output, lattice, tile, False, d_do, S)
        if grad_query is not None:
            if S.l2 and gq is not None and grad_lse is not None:
                dq = subtract_scaled(dq, dl, gq, S)
            store_about_own_keys(grad_query, lattice, tile, dq, totals_of(sb_sums), key, scale, S)


@triton.jit(do_not_specialize=SIZES)
def double_key_kernel(
    cot_query, cot_key, x_terms, cot_value, cot_table, grad_output, query, key, score_terms, value,
    numbers, grad_key, grad_value, table, members,
    scale, heads, tiles, depth, height, width, window_z, window_y, window_x, table_planes, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """Gradients of K and V, gathered from the queries that see a tile of keys: up to eight products per block."""
    OWN: tl.constexpr = S.own
    lattice, box = own_tile(heads, tiles, members, depth, height, width, window_z, window_y, window_x, True, S)
    if empty(box):
        return
    scale = number(scale, S)
    first_table = head_table(table, lattice.head, table_planes, table_rows, table_columns, S)
    first_pairs = head_table(cot_table, lattice.head, table_planes, table_rows, table_columns, S, 2)
    tile = own_place(box, S)
    keys = as_keys(tile, 1)
    k = load_rows(key, lattice, tile, True, S)
    v = load_rows(value, lattice, tile, True, S)
    gk = load_rows(cot_key, lattice, tile, True, S)
    gv = load_rows(cot_value, lattice, tile, True, S)
    k_term = per_key(score_terms, lattice, tile, 1, S)
    k_x_term = per_key(x_terms, lattice, tile, 1, S)
    dk = zero_rows(OWN, S)
    dv = zero_rows(OWN, S)
    sb_sums = zero_totals(OWN, S)
    ds_sums = zero_totals(OWN, S)
    halo = queries_of(box, lattice, S)
    blocks = block_count(halo, S)
    for step in tl.range(steps_of(blocks, S), disable_licm=S.streamed or wide(S.chunks)):
        of_head, block = turn_of(lattice, step, blocks, S)
        entries = table_in_turn(first_table, table, of_head.head, table_planes, table_rows, table_columns, S)
        pairs = table_in_turn(first_pairs, cot_table, of_head.head, table_planes, table_rows, table_columns, S, 2)
        there = block_place(halo, block, S)
        queries = as_queries(there, halo, of_head, 0, S)
        seeing = not_beyond(there, halo, S)
        row = load_numbers(numbers, of_head, seeing, SECOND, 0, S)
        second = load_second_numbers(numbers, of_head, seeing, 0, S)
        q = load_rows(query, of_head, there, False, S)
        gq = load_rows(cot_query, of_head, there, False, S)
        do = load_rows(grad_output, of_head, there, False, S)
        scores, x = logits_and_x(
            q, k, row.term, k_term, gq, gk, second.term, k_x_term, queries, keys, entries, pairs, scale,
            True, S,
        )  # fmt: skip
        weights = weights_of_queries(scores, row, entries, there, S)
        y = x - second.r
        dv = add_weighted(dv, rounded(weights * y, do, S), do, S)
        c = pair_products(do, v, True, S) - row.d
        g = pair_products(do, gv, True, S) if gv is not None else None
        sb = rounded(second_score_gradient(weights, y, c, g, second.t), q, S)
        dk = add_weighted(dk, sb, q, S)
        ds = rounded(weights * c, q, S)
        if gq is not None:
            dk = add_weighted(dk, ds, gq, S)
        if S.l2:
            sb_sums = add_totals(sb_sums, sb, S)
            ds_sums = add_totals(ds_sums, ds, S)
    if S.l2:
        dk = subtract_scaled(dk, totals_of(sb_sums), k, S)
        if gk is not None:
            dk = subtract_scaled(dk, totals_of(ds_sums), gk, S)
    store_rows(grad_key, lattice, tile, True, scaled(dk, scale, S), S)
    store_rows(grad_value, lattice, tile, True, dv, S)


def double_backward(launch: Launch) -> Results:
    """Gradients of ``(grad_output, grad_lse, query, key, value, bias)``; see ``natten_ext.orders``."""
    operands = launch.operands
    of_output, of_lse, of_query, of_key, of_value, of_bias = operands.needs
    table = padded_table(launch, operands.cot_bias)
    cot_table = None if operands.cot_bias is None else table
    gq, gk, gv = (rows_of(tensor) for tensor in (operands.cot_query, operands.cot_key, operands.cot_value))
    cots = gq, gk, x_terms(launch, gq, gk), gv, cot_table
    do, v, out = (rows_of(tensor) for tensor in (operands.grad_output, operands.value, operands.output))
    terms = score_terms(launch)
    numbers = launch.empty((*launch.row_shape, SECOND.value)) if of_key or of_value or of_bias else None
    grad_grad_output = launch.like(operands.query, of_output)
    grad_grad_lse = launch.empty(launch.row_shape) if of_lse else None
    grad_query = launch.like(operands.query, of_query)
    launch.run(
        double_query_kernel, "double_query", QUERY, *cots, do, operands.grad_lse, launch.query, launch.key, terms, v,
        out, *operands.lse, numbers, rows_of(grad_grad_output), grad_grad_lse, rows_of(grad_query), table,
    )  # fmt: skip
    maps = do, launch.query, launch.key, terms, v
    grad_key, grad_value, grad_bias = None, None, None
    if of_key or of_value:
        grad_key, grad_value = launch.like(operands.key), launch.like(operands.value)
        launch.run(
            double_key_kernel, "double_key", KEY, *cots, *maps, numbers, rows_of(grad_key), rows_of(grad_value), table
        )  # fmt: skip
    if of_bias:
        grad_bias = table_gradient(launch, "double_table", table, cots, maps, numbers)
    return grad_grad_output, grad_grad_lse, grad_query, grad_key, grad_value, grad_bias
