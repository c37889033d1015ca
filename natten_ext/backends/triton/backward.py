"""The backward: a pass over tiles of queries, one over tiles of keys, and one for the table (table_gradient.py).

The formulas are in docs/double_backward.md. Nothing is added up across programs: the gradient of a key is gathered
by the program that owns it, from the queries that see it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distances import score_terms
from .geometry import SIZES, empty, keys_of, own_tile, queries_of, turn_of
from .launch import Launch, Results, rows_of
from .places import as_keys, as_queries, block_count, block_place, not_beyond, own_place, steps_of
from .problem import KEY, QUERY
from .row_numbers import FIRST, RowNumbers, load_numbers, store_numbers
from .scores import block_of_keys, logits, pair_products, per_key, per_query, weights_of_queries
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
    store_rows,
    subtract_multiples,
    subtract_scaled,
    totals_of,
    two_fit,
    zero_rows,
    zero_totals,
    zeros,
)


@triton.jit
def _weights_and_ds(
    q, row, do, key, score_terms, value, queries, table, scale, lattice, halo, block, S: tl.constexpr
):  # fmt: skip
    """K of a block, P and dS, rounded, of a tile of queries."""
    k, v, scores = block_of_keys(key, value, score_terms, q, row.term, queries, table, scale, lattice, halo, block, S)
    weights = tl.exp2(scores - row.base - row.log_sum)
    return k, weights, rounded(weights * (pair_products(do, v, False, S) - row.d), k, S)


@triton.jit(do_not_specialize=SIZES)
def backward_query_kernel(
    grad_output, grad_lse, query, key, score_terms, value, output, base, log_sum, numbers, grad_query, table, members,
    scale, heads, tiles, depth, height, width, window_z, window_y, window_x, table_planes, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """D, less the gradient of the log-sum-exp, for the other passes (two products per block), and dQ unless
    ``grad_query`` is None (two more).

    D = rowsum(dO * O) has the rounding of O. So the sum of a row of dS, which should be that gradient or zero, shows
    what D lacks. That sum times the mean of keys under the weights is what dQ has too much. Where the registers do
    not hold the sum of keys besides dQ, D gets what it lacks before dQ, in a walk of its own; roundings are left over.
    """
    OWN: tl.constexpr = S.own
    D_FIRST: tl.constexpr = grad_query is not None and not two_fit(S.chunks)
    lattice, box = own_tile(heads, tiles, members, depth, height, width, window_z, window_y, window_x, False, S)
    if empty(box):
        return
    scale = number(scale, S)
    table = head_table(table, lattice.head, table_planes, table_rows, table_columns, S)
    tile = own_place(box, S)
    queries = as_queries(tile, box, lattice, 1, S)
    base = load_column(base, lattice, tile, S)
    log_sum = load_column(log_sum, lattice, tile, S)
    q = load_rows(query, lattice, tile, False, S)
    q_term = per_query(score_terms, lattice, tile, S)
    do = load_rows(grad_output, lattice, tile, False, S)
    near_d = row_products(do, load_rows(output, lattice, tile, False, S), OWN, S)
    dl = zeros(OWN, 1, S.accumulate)
    if grad_lse is not None:
        dl = load_column(grad_lse, lattice, tile, S)
        near_d -= dl
    row = RowNumbers(base, log_sum, near_d, q_term)
    halo = keys_of(box, lattice, S)
    if D_FIRST:
        rest = zero_totals(OWN, S)
        for block in range(block_count(halo, S)):
            _, _, ds = _weights_and_ds(
                q, row, do, key, score_terms, value, queries, table, scale, lattice, halo, block, S
            )
            rest = add_totals(rest, ds, S)
        row = RowNumbers(base, log_sum, near_d + totals_of(rest) - dl, q_term)
    rest = zero_totals(OWN, S)
    dq = zero_rows(OWN, S)
    key_sums = zero_rows(OWN, S)
    weight_sums = zero_totals(OWN, S)
    for block in range(block_count(halo, S)):
        k, weights, ds = _weights_and_ds(
            q, row, do, key, score_terms, value, queries, table, scale, lattice, halo, block, S
        )
        rest = add_totals(rest, ds, S)
        if grad_query is not None:
            dq = add_weighted(dq, ds, k, S)
            if not D_FIRST:
                weights = rounded(weights, k, S)
                key_sums = add_weighted(key_sums, weights, k, S)
                weight_sums = add_totals(weight_sums, weights, S)
    rest = totals_of(rest) - dl
    store_numbers(numbers, lattice, tile, RowNumbers(base, log_sum, row.d + rest, q_term), 0, FIRST, S)
    if grad_query is not None:
        if S.l2 and grad_lse is not None:
            dq = subtract_scaled(dq, dl, q, S)
        if D_FIRST:
            store_about_own_keys(grad_query, lattice, tile, dq, rest, key, scale, S)
        else:
            # Rounded weights do not sum to one, and keys may be large.
            dq = subtract_multiples(dq, rest / totals_of(weight_sums), key_sums, S)
            store_rows(grad_query, lattice, tile, False, scaled(dq, scale, S), S)


@triton.jit(do_not_specialize=SIZES)
def backward_key_kernel(
    grad_output, query, key, score_terms, value, numbers, grad_key, grad_value, table, members,
    scale, heads, tiles, depth, height, width, window_z, window_y, window_x, table_planes, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """dK and dV, gathered from the queries that see a tile of keys: four products per block."""
    OWN: tl.constexpr = S.own
    lattice, box = own_tile(heads, tiles, members, depth, height, width, window_z, window_y, window_x, True, S)
    if empty(box):
        return
    scale = number(scale, S)
    first_table = head_table(table, lattice.head, table_planes, table_rows, table_columns, S)
    tile = own_place(box, S)
    keys = as_keys(tile, 1)
    k = load_rows(key, lattice, tile, True, S)
    v = load_rows(value, lattice, tile, True, S)
    k_term = per_key(score_terms, lattice, tile, 1, S)
    dk = zero_rows(OWN, S)
    dv = zero_rows(OWN, S)
    ds_sums = zero_totals(OWN, S)
    halo = queries_of(box, lattice, S)
    blocks = block_count(halo, S)
    for step in range(steps_of(blocks, S)):
        of_head, block = turn_of(lattice, step, blocks, S)
        entries = table_in_turn(first_table, table, of_head.head, table_planes, table_rows, table_columns, S)
        there = block_place(halo, block, S)
        queries = as_queries(there, halo, of_head, 0, S)
        q = load_rows(query, of_head, there, False, S)
        do = load_rows(grad_output, of_head, there, False, S)
        row = load_numbers(numbers, of_head, not_beyond(there, halo, S), FIRST, 0, S)
        scores = logits(q, k, row.term, k_term, queries, keys, entries, scale, True, S)
        weights = weights_of_queries(scores, row, entries, there, S)
        dv = add_weighted(dv, weights, do, S)
        ds = rounded(weights * (pair_products(do, v, True, S) - row.d), q, S)
        dk = add_weighted(dk, ds, q, S)
        if S.l2:
            ds_sums = add_totals(ds_sums, ds, S)
    if S.l2:
        dk = subtract_scaled(dk, totals_of(ds_sums), k, S)
    store_rows(grad_key, lattice, tile, True, scaled(dk, scale, S), S)
    store_rows(grad_value, lattice, tile, True, dv, S)


def backward(launch: Launch) -> Results:
    """``(grad_query, grad_key, grad_value, grad_bias)``; see ``natten_ext.orders``."""
    operands = launch.operands
    of_query, of_key, of_value, of_bias = operands.needs
    q, k, terms = launch.query, launch.key, score_terms(launch)
    do, v, out = (rows_of(tensor) for tensor in (operands.grad_output, operands.value, operands.output))
    table = padded_table(launch)
    numbers = launch.empty((*launch.row_shape, FIRST.value))
    grad_query = launch.like(operands.query, of_query)
    launch.run(
        backward_query_kernel, "backward_query", QUERY, do, operands.grad_lse, q, k, terms, v, out, *operands.lse,
        numbers, rows_of(grad_query), table,
    )  # fmt: skip
    grad_key, grad_value, grad_bias = None, None, None
    if of_key or of_value:
        grad_key, grad_value = launch.like(operands.key), launch.like(operands.value)
        dk, dv = rows_of(grad_key), rows_of(grad_value)
        launch.run(backward_key_kernel, "backward_key", KEY, do, q, k, terms, v, numbers, dk, dv, table)
    if of_bias:
        grad_bias = table_gradient(launch, "table", table, (None,) * 5, (do, q, k, terms, v), numbers)
    return grad_query, grad_key, grad_value, grad_bias
