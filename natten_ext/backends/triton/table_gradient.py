"""The gradient of a relative position table: sums of score gradients over equal offsets, in a fixed order.

A program owns one displacement of a block of keys from a tile of queries, and goes through a share of all tiles. So
every element of its [tile, block] accumulator stands for one offset throughout, and stays in registers; at the end
it is summed over equal offsets. A second kernel sums the programs' results. Used by the backward and the double
backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .configs import Config
from .geometry import SIZES, Box, Place, as_keys, as_queries, empty, keys_of, locate, own_place
from .problem import QUERY, displacements, offset_extent
from .scores import (
    cot_scores,
    logits,
    pair_products,
    per_key,
    per_query,
    second_score_gradient,
    table_centre,
)
from .tiles import load_rows, number, row_numbers, wide

# Programs at most, unless there are more displacements. Fixed, so that sums have one order on every GPU.
MAX_PROGRAMS = 1024

RANGES = ("items", "shares", "first_y", "first_x", "count_y", "count_x", "shift_y", "shift_x")
EXTENTS = ("own_h", "own_w", "block_h", "block_w", "offset_rows", "offset_columns")

SUM_WIDTH = 32
SUM_CONFIG = Config(own=1, block=SUM_WIDTH, warps=1, stages=1)

_offsets = triton.constexpr_function(offset_extent)


@triton.jit
def _sum_equal_offsets(pairs, S: tl.constexpr):
    """Sums of [tile, block] over equal offsets: [columns, rows], index 0 being the offset 1 - tile's extent."""
    ROWS: tl.constexpr = _offsets(S.own_h, S.block_h)
    COLUMNS: tl.constexpr = _offsets(S.own_w, S.block_w)
    pairs = tl.permute(tl.reshape(pairs, (S.own_h, S.own_w, S.block_h, S.block_w)), (0, 2, 1, 3))
    # Shift every query's keys to their offsets, then add the queries up.
    source = tl.arange(0, COLUMNS)[None, :] + (tl.arange(0, S.own_w) - (S.own_w - 1))[:, None]
    exists = (source >= 0) & (source < S.block_w)
    source = tl.where(exists, source, 0)[None, None]
    pairs = tl.gather(pairs, tl.broadcast_to(source, (S.own_h, S.block_h, S.own_w, COLUMNS)), 3)
    pairs = tl.sum(tl.where(exists[None, None], pairs, 0.0), 2)

    pairs = tl.permute(pairs, (0, 2, 1))
    source = tl.arange(0, ROWS)[None, :] + (tl.arange(0, S.own_h) - (S.own_h - 1))[:, None]
    exists = (source >= 0) & (source < S.block_h)
    source = tl.where(exists, source, 0)[:, None]
    pairs = tl.gather(pairs, tl.broadcast_to(source, (S.own_h, COLUMNS, ROWS)), 2)
    return tl.sum(tl.where(exists[:, None], pairs, 0.0), 0)


@triton.jit(do_not_specialize=SIZES + RANGES)
def table_shares_kernel(
    cot_query, cot_key, x_terms, cot_value, cot_table, grad_output, query, key, score_terms, value, base, log_sum,
    row_means, row_x_means, row_offsets, sums, items, shares, first_y, first_x, count_y, count_x, shift_y, shift_x,
    table, members, scale, heads, tiles, height, width, window_y, window_x, table_rows, table_columns,
    S: tl.constexpr,
):  # fmt: skip
    """One program's sums. Its offsets are those of a block at ``shift + (first + row or column) * block``."""
    OWN: tl.constexpr = S.own_h * S.own_w
    BLOCK: tl.constexpr = S.block_h * S.block_w
    ROWS: tl.constexpr = _offsets(S.own_h, S.block_h)
    COLUMNS: tl.constexpr = _offsets(S.own_w, S.block_w)
    program = tl.program_id(0)
    head = program % heads
    displacement = program // heads % (count_y * count_x)
    share = program // heads // (count_y * count_x)
    down = shift_y + (first_y + displacement // count_x) * S.block_h
    right = shift_x + (first_x + displacement % count_x) * S.block_w
    scale = number(scale, S)
    table = table_centre(table, head, table_rows, table_columns)
    if cot_table is not None:
        cot_table = table_centre(cot_table, head, table_rows, table_columns)

    pairs = tl.zeros((OWN, BLOCK), S.accumulate)
    element = tl.arange(0, BLOCK)
    each = tl.cdiv(items, shares)
    first, last = share * each, tl.minimum((share + 1) * each, items)
    for item in tl.range(first, last, disable_licm=wide(S.chunks) and not S.streamed):
        batch = item // tiles
        lattice, box = locate(item % tiles, head, members, height, width, window_y, window_x, False, S)
        reach = keys_of(box, lattice, S)
        block = Box(
            tl.maximum(box.low_y + down, reach.low_y),
            tl.maximum(box.low_x + right, reach.low_x),
            tl.minimum(box.low_y + down + S.block_h, reach.high_y),
            tl.minimum(box.low_x + right + S.block_w, reach.high_x),
        )
        if not (empty(box) | empty(block)):
            place = own_place(box, S)
            queries = as_queries(place, lattice, table_columns, 1, S)
            y = box.low_y + down + element // S.block_w
            x = box.low_x + right + element % S.block_w
            inside = (y >= block.low_y) & (y < block.high_y) & (x >= block.low_x) & (x < block.high_x)
            there = Place(y, x, inside)
            near = Place(tl.maximum(y, block.low_y), tl.maximum(x, block.low_x), inside)
            keys = as_keys(there, table_columns, 0)
            numbers = row_numbers(batch, head, heads, height, width, lattice, place)
            origin = tl.load(base + numbers, mask=place.valid, other=0.0)[:, None]
            spread = tl.load(log_sum + numbers, mask=place.valid, other=0.0)[:, None]
            mean = tl.load(row_means + numbers, mask=place.valid, other=0.0)[:, None]
            q = load_rows(query, batch, head, lattice, place, S)
            q_term = per_query(score_terms, numbers, place.valid, 1, S)
            k = load_rows(key, batch, head, lattice, there, S)
            k_term = per_key(score_terms, batch, head, heads, height, width, lattice, near, block, 0, S)
            scores = logits(q, k, q_term, k_term, queries, keys, table, scale, lattice, False, S)
            weights = tl.exp2(scores - origin - spread)
            do = load_rows(grad_output, batch, head, lattice, place, S)
            v = load_rows(value, batch, head, lattice, there, S)
            d_weights = pair_products(do, v, False, S) - mean
            if row_x_means is None:
                pairs += weights * d_weights
            else:
                x_mean = tl.load(row_x_means + numbers, mask=place.valid, other=0.0)[:, None]
                offset = tl.load(row_offsets + numbers, mask=place.valid, other=0.0)[:, None]
                gq = load_rows(cot_query, batch, head, lattice, place, S) if cot_query is not None else None
                gk = load_rows(cot_key, batch, head, lattice, there, S) if cot_key is not None else None
                q_x_term = per_query(x_terms, numbers, place.valid, 1, S)
                k_x_term = per_key(x_terms, batch, head, heads, height, width, lattice, near, block, 0, S)
                x = (
                    cot_scores(q, gq, k, gk, q_x_term, k_x_term, cot_table, queries, keys, scale, lattice, False, S)
                    - x_mean
                )
                g = None
                if cot_value is not None:
                    g = pair_products(do, load_rows(cot_value, batch, head, lattice, there, S), False, S)
                pairs += second_score_gradient(weights, x, d_weights, g, offset)

    here = sums + program.to(tl.int64) * (COLUMNS * ROWS)
    index = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(here + index, _sum_equal_offsets(pairs, S))


@triton.jit(do_not_specialize=(*RANGES, *EXTENTS, "heads", "table_rows", "table_columns"))
def table_sum_kernel(
    sums, grad_table, items, shares, first_y, first_x, count_y, count_x, shift_y, shift_x,
    own_h, own_w, block_h, block_w, offset_rows, offset_columns, heads, table_rows, table_columns,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` entries of a head's table in one row: the sums of all programs over shares and displacements, in order.

    It takes little time, so it is compiled once for all tiles.
    """
    program = tl.program_id(0)
    head = program % heads
    row = program // heads % table_rows
    column = program // heads // table_rows * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), sums.dtype.element_ty)
    for part in range(shares * count_y * count_x):
        displacement = part % (count_y * count_x)
        down = shift_y + (first_y + displacement // count_x) * block_h
        right = shift_x + (first_x + displacement % count_x) * block_w
        y = row - table_rows // 2 - down + own_h - 1
        x = column - table_columns // 2 - right + own_w - 1
        there = (y >= 0) & (y < offset_rows) & (x >= 0) & (x < offset_columns) & (column < table_columns)
        here = sums + (part * heads + head).to(tl.int64) * (offset_columns * offset_rows)
        total += tl.load(here + x * offset_rows + y, mask=there, other=0.0)
    tl.store(
        grad_table + (head * table_rows + row) * table_columns + column,
        total.to(grad_table.dtype.element_ty),
        mask=column < table_columns,
    )


def table_gradient(launch, step, bias, cotangents, do, q, k, terms, v, lse, means, x_means=None, offsets=None):
    """Gradient of the table: of the second order if ``x_means`` and ``offsets`` (r and t) are given."""
    problem = launch.problem
    static, tiles, config = launch.static(step, QUERY)
    items = tiles.tiles * problem.batch
    if items == 0:
        return bias.new_zeros(bias.shape)
    (first_y, count_y, shift_y), (first_x, count_x, shift_x) = displacements(problem, tiles)
    shares = max(1, min(items, MAX_PROGRAMS // (problem.heads * count_y * count_x)))
    if static.interpreted:
        shares = min(shares, 2)
    ranges = items, shares, first_y, first_x, count_y, count_x, shift_y, shift_x
    programs = shares * count_y * count_x * problem.heads
    extents = *tiles.own, *tiles.block, *(offset_extent(*pair) for pair in zip(tiles.own, tiles.block, strict=True))
    sums = lse.new_empty((programs, extents[-2] * extents[-1]))
    maps = *cotangents, do, q, k, terms, v
    arguments = *maps, *lse, means, x_means, offsets, sums, *ranges, launch.table, *launch.sizes(tiles.tiles)
    launch.start(table_shares_kernel, programs, arguments, config, S=static)
    grad = bias.new_empty(bias.shape)
    heads, rows, columns = bias.shape
    parts = -(-columns // SUM_WIDTH)
    arguments = sums, grad, *ranges, *extents, heads, rows, columns
    launch.start(table_sum_kernel, heads * rows * parts, arguments, SUM_CONFIG, WIDTH=SUM_WIDTH)
    return grad
