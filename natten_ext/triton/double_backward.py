"""The double backward: the same passes as the backward. The formulas are in docs/double_backward.md.

There, t = e - 2 D r + dO.w with e = sum_j P X dP = dO.u. So t = dO.(u + w) - 2 D r, and one accumulator, u + w, is
enough: neither e nor w is needed by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    queries_of,
)
from .launch import Launch, asked, rows_of
from .problem import KEY, QUERY
from .scores import (
    cot_key_bias_of,
    cot_scores,
    key_bias_of,
    logits,
    second_score_gradient,
    table_centre,
)
from .table_gradient import table_gradient
from .tiles import (
    add_weighted,
    load_rows,
    number,
    product,
    row_dots,
    row_numbers,
    row_sums,
    scaled,
    store_rows,
    subtract_scaled,
    zero_rows,
)


@triton.jit(do_not_specialize=SIZES)
def double_query_kernel(
    cot_query, cot_key, cot_value, cot_table, grad_output, query, key, value, output, base, log_sum,
    row_means, row_x_means, row_offsets, grad_grad_output, grad_query, table, members,
    scale, heads, tiles, height, width, window_y, window_x, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """Two walks over the keys. The first gives r, t and the gradient of dO (up to five products per block); the second
    the gradient of Q, unless ``grad_query`` is None (up to seven)."""
    OWN: tl.constexpr = S.own_h * S.own_w
    BLOCK: tl.constexpr = S.block_h * S.block_w
    batch, head, lattice, box = own_tile(heads, tiles, members, height, width, window_y, window_x, False, S)
    if empty(box):
        return
    scale = number(scale, S)
    if table is not None:
        table = table_centre(table, head, table_rows, table_columns)
    if cot_table is not None:
        cot_table = table_centre(cot_table, head, table_rows, table_columns)
    place = own_place(box, S)
    queries = as_queries(place, lattice, table_columns, 1, S)
    numbers = row_numbers(batch, head, heads, height, width, lattice, place)
    origin = tl.load(base + numbers, mask=place.valid, other=0.0)[:, None]
    spread = tl.load(log_sum + numbers, mask=place.valid, other=0.0)[:, None]
    q = load_rows(query, batch, head, lattice, place, S)
    gq = load_rows(cot_query, batch, head, lattice, place, S) if cot_query is not None else None
    reach = keys_of(box, lattice, S)

    x_mean = tl.zeros((OWN,), S.accumulate)
    rows = zero_rows(OWN, S)
    # Streamed rows leave no registers to hold what is invariant over the walks.
    for block in tl.range(block_count(reach, S), disable_licm=S.streamed):
        there = block_place(reach, block, S)
        keys = as_keys(there, table_columns, 0)
        k = load_rows(key, batch, head, lattice, there, S)
        gk = load_rows(cot_key, batch, head, lattice, there, S) if cot_key is not None else None
        key_bias = key_bias_of(k, scale, 0, BLOCK, S) if S.l2 else None
        scores = logits(product(q, k, OWN, BLOCK, S), key_bias, queries, keys, table, scale, lattice, S)
        weights = tl.exp2(scores - origin - spread)
        cot_key_bias = cot_key_bias_of(gk, k, scale, 0, BLOCK, S) if S.l2 and cot_key is not None else None
        x = weights * cot_scores(gq, q, k, gk, cot_key_bias, cot_table, queries, keys, scale, lattice, OWN, BLOCK, S)
        x_mean += tl.sum(x, 1)
        rows = add_weighted(rows, x, load_rows(value, batch, head, lattice, there, S), S)
        if cot_value is not None:
            rows = add_weighted(rows, weights, load_rows(cot_value, batch, head, lattice, there, S), S)

    do = load_rows(grad_output, batch, head, lattice, place, S)
    out = load_rows(output, batch, head, lattice, place, S)
    mean = row_sums(do, out, OWN, S)
    offset = row_dots(rows, do, OWN, S) - 2 * mean * x_mean
    store_rows(grad_grad_output, batch, head, lattice, place, subtract_scaled(rows, x_mean, out, S), S)
    tl.store(row_means + numbers, mean, mask=place.valid)
    tl.store(row_x_means + numbers, x_mean, mask=place.valid)
    tl.store(row_offsets + numbers, offset, mask=place.valid)

    if grad_query is not None:
        dq = zero_rows(OWN, S)
        for block in tl.range(block_count(reach, S), disable_licm=S.streamed):
            there = block_place(reach, block, S)
            keys = as_keys(there, table_columns, 0)
            k = load_rows(key, batch, head, lattice, there, S)
            gk = load_rows(cot_key, batch, head, lattice, there, S) if cot_key is not None else None
            key_bias = key_bias_of(k, scale, 0, BLOCK, S) if S.l2 else None
            scores = logits(product(q, k, OWN, BLOCK, S), key_bias, queries, keys, table, scale, lattice, S)
            weights = tl.exp2(scores - origin - spread)
            cot_key_bias = cot_key_bias_of(gk, k, scale, 0, BLOCK, S) if S.l2 and cot_key is not None else None
            x = cot_scores(gq, q, k, gk, cot_key_bias, cot_table, queries, keys, scale, lattice, OWN, BLOCK, S)
            d_weights = product(do, load_rows(value, batch, head, lattice, there, S), OWN, BLOCK, S)
            g = None
            if cot_value is not None:
                g = product(do, load_rows(cot_value, batch, head, lattice, there, S), OWN, BLOCK, S)
            d_scores = second_score_gradient(weights, x, d_weights, g, mean[:, None], x_mean[:, None], offset[:, None])
            dq = add_weighted(dq, d_scores, k, S)
            if gk is not None:
                dq = add_weighted(dq, weights * (d_weights - mean[:, None]), gk, S)
        store_rows(grad_query, batch, head, lattice, place, scaled(dq, scale, S), S)


@triton.jit(do_not_specialize=SIZES)
def double_key_kernel(
    cot_query, cot_key, cot_value, cot_table, grad_output, query, key, value, base, log_sum,
    row_means, row_x_means, row_offsets, grad_key, grad_value, table, members,
    scale, heads, tiles, height, width, window_y, window_x, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """Gradients of K and V, gathered from the queries that see a tile of keys: up to eight products per block."""
    OWN: tl.constexpr = S.own_h * S.own_w
    BLOCK: tl.constexpr = S.block_h * S.block_w
    batch, head, lattice, box = own_tile(heads, tiles, members, height, width, window_y, window_x, True, S)
    if empty(box):
        return
    scale = number(scale, S)
    if table is not None:
        table = table_centre(table, head, table_rows, table_columns)
    if cot_table is not None:
        cot_table = table_centre(cot_table, head, table_rows, table_columns)
    place = own_place(box, S)
    keys = as_keys(place, table_columns, 1)
    k = load_rows(key, batch, head, lattice, place, S)
    v = load_rows(value, batch, head, lattice, place, S)
    gk = load_rows(cot_key, batch, head, lattice, place, S) if cot_key is not None else None
    gv = load_rows(cot_value, batch, head, lattice, place, S) if cot_value is not None else None
    key_bias = key_bias_of(k, scale, 1, OWN, S) if S.l2 else None
    cot_key_bias = cot_key_bias_of(gk, k, scale, 1, OWN, S) if S.l2 and cot_key is not None else None
    dk = zero_rows(OWN, S)
    dv = zero_rows(OWN, S)
    d_key_bias = tl.zeros((OWN,), S.accumulate)
    first_d_key_bias = tl.zeros((OWN,), S.accumulate)
    reach = queries_of(box, lattice, S)
    for block in tl.range(block_count(reach, S), disable_licm=S.streamed):
        there = block_place(reach, block, S)
        queries = as_queries(there, lattice, table_columns, 0, S)
        numbers = row_numbers(batch, head, heads, height, width, lattice, there)
        origin = tl.load(base + numbers, mask=there.valid, other=0.0)[None, :]
        spread = tl.load(log_sum + numbers, mask=there.valid, other=0.0)[None, :]
        mean = tl.load(row_means + numbers, mask=there.valid, other=0.0)[None, :]
        x_mean = tl.load(row_x_means + numbers, mask=there.valid, other=0.0)[None, :]
        offset = tl.load(row_offsets + numbers, mask=there.valid, other=0.0)[None, :]
        q = load_rows(query, batch, head, lattice, there, S)
        gq = load_rows(cot_query, batch, head, lattice, there, S) if cot_query is not None else None
        do = load_rows(grad_output, batch, head, lattice, there, S)
        scores = logits(product(k, q, OWN, BLOCK, S), key_bias, queries, keys, table, scale, lattice, S)
        weights = tl.exp2(scores - origin - spread)
        x = cot_scores(gk, k, q, gq, cot_key_bias, cot_table, queries, keys, scale, lattice, OWN, BLOCK, S)
        dv = add_weighted(dv, weights * (x - x_mean), do, S)
        d_weights = product(v, do, OWN, BLOCK, S)
        g = None
        if gv is not None:
            g = product(gv, do, OWN, BLOCK, S)
        d_scores = second_score_gradient(weights, x, d_weights, g, mean, x_mean, offset)
        dk = add_weighted(dk, d_scores, q, S)
        first_d_scores = weights * (d_weights - mean)
        if gq is not None:
            dk = add_weighted(dk, first_d_scores, gq, S)
        if S.l2:
            d_key_bias += tl.sum(d_scores, 1)
            first_d_key_bias += tl.sum(first_d_scores, 1)
    if S.l2:
        dk = subtract_scaled(dk, d_key_bias, k, S)
        if gk is not None:
            dk = subtract_scaled(dk, first_d_key_bias, gk, S)
    store_rows(grad_key, batch, head, lattice, place, scaled(dk, scale, S), S)
    store_rows(grad_value, batch, head, lattice, place, dv, S)


def double_backward(
    cot_query, cot_key, cot_value, cot_bias, grad_output, query, key, value, bias, output, lse,
    neighborhood, score, scale, needs,
):  # fmt: skip
    """Gradients of ``(grad_output, query, key, value, bias)``; see ``natten_ext.ops``."""
    if not any(needs):
        return asked(query, (None,) * 5, needs)
    launch = Launch(query, key, bias, neighborhood, score, scale)
    cot_bias = None if cot_bias is None else cot_bias.contiguous()
    cots = (*(rows_of(tensor) for tensor in (cot_query, cot_key, cot_value)), cot_bias)
    do, q, k, v, out = (rows_of(tensor) for tensor in (grad_output, query, key, value, output))
    means, x_means, offsets = (lse.new_empty(launch.row_shape) for _ in range(3))
    grad_grad_output = grad_output.new_empty(grad_output.shape)
    grad_query = query.new_empty(query.shape) if needs[1] else None
    launch.run(
        double_query_kernel, "double_query", QUERY, *cots, do, q, k, v, out, *lse, means, x_means, offsets,
        rows_of(grad_grad_output), rows_of(grad_query) if needs[1] else None, launch.table,
    )  # fmt: skip
    grad_key, grad_value, grad_bias = None, None, None
    if needs[2] or needs[3]:
        grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
        launch.run(
            double_key_kernel, "double_key", KEY, *cots, do, q, k, v, *lse, means, x_means, offsets,
            rows_of(grad_key), rows_of(grad_value), launch.table,
        )  # fmt: skip
    if needs[4]:
        grad_bias = table_gradient(launch, "double_table", bias, cots, do, q, k, v, lse, means, x_means, offsets)
    return asked(query, (grad_grad_output, grad_query, grad_key, grad_value, grad_bias), needs)
