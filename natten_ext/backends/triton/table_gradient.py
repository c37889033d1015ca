"""The gradient of a relative position table: sums of score gradients over equal offsets, in a fixed order.

A program owns a block of keys at one place relative to its tile of queries, and visits tiles of many images. So
every element of its [tile, block] accumulator stands for one offset throughout, and stays in registers; at the end
it is summed over equal offsets. Two small kernels sum the programs' results. Used by the backward and the double
backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import Config
from .geometry import (
    SIZES,
    as_keys,
    as_queries,
    in_keys,
    lattice_at,
    not_beyond,
    own_place,
    tile_box,
    window_of,
)
from .launch import kept_on_device, made_on
from .problem import QUERY, Problem, Tiling, displacements, offset_extent
from .row_numbers import FIRST, SECOND, load_numbers, load_second_numbers
from .scores import logits, logits_and_x, pair_products, per_key, second_score_gradient
from .tables import head_table
from .tiles import load_rows, number, wide

# Fixed, so that sums have one order on every GPU: programs that a GPU is full with; tiles that a program visits, unless
# there would be more programs than may be.
FULL = 2048
VISITS = 64
MAX_PROGRAMS = 8192

EXTENTS = ("own_h", "own_w", "offset_rows", "offset_columns", "heads", "table_rows", "table_columns")

SUM_WIDTH = 32
SUM_AT_ONCE = 16
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


@triton.jit(do_not_specialize=SIZES)
def table_shares_kernel(
    cot_query, cot_key, x_terms, cot_value, cot_table, grad_output, query, key, score_terms, value, numbers, sums, work,
    table, members, scale, heads, tiles, height, width, window_y, window_x, table_rows, table_columns,
    SECOND_ORDER: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One program's sums over its visits, which ``work`` lists (see ``_work_on``)."""
    OWN: tl.constexpr = S.own_h * S.own_w
    BLOCK: tl.constexpr = S.block_h * S.block_w
    ROWS: tl.constexpr = _offsets(S.own_h, S.block_h)
    COLUMNS: tl.constexpr = _offsets(S.own_w, S.block_w)
    COUNT: tl.constexpr = SECOND if SECOND_ORDER else FIRST
    work += tl.program_id(0) * 10
    head = tl.load(work)
    visit = tl.load(work + 1)
    visits = tl.load(work + 2)
    down = tl.load(work + 3)
    first_y = tl.load(work + 4)
    last_y = first_y + tl.load(work + 5)
    right = tl.load(work + 6)
    first_x = tl.load(work + 7)
    last_x = first_x + tl.load(work + 8)
    slot = tl.load(work + 9)
    window = window_of(head, members, height, width, window_y, window_x, S)
    scale = number(scale, S)
    table = head_table(table, head, table_rows, table_columns)
    if cot_table is not None:
        cot_table = head_table(cot_table, head, table_rows, table_columns, 2)

    # Visits go along the tiles of a lattice, then over the lattices, then over images.
    tile_x = first_x + visit % (last_x - first_x)
    visit = visit // (last_x - first_x)
    tile_y = first_y + visit % (last_y - first_y)
    visit = visit // (last_y - first_y)
    lattice_x = visit % window.columns
    visit = visit // window.columns
    lattice_y = visit % window.rows
    batch = visit // window.rows

    pairs = tl.zeros((OWN, BLOCK), S.accumulate)
    element = tl.arange(0, BLOCK)
    for _ in tl.range(visits, disable_licm=wide(S.chunks) and not S.streamed):
        lattice = lattice_at(batch, head, heads, lattice_y, lattice_x, window, height, width, S)
        box = tile_box(lattice, tile_y, tile_x, False, S)
        tile = own_place(box, S)
        queries = as_queries(tile, box, lattice, 1, S)
        y = box.low_y + down + element // S.block_w
        x = box.low_x + right + element % S.block_w
        there = in_keys(y, x, lattice, S)
        keys = as_keys(there, 0)
        existing = not_beyond(tile, box, S)
        row = load_numbers(numbers, lattice, existing, COUNT, 1, S)
        q = load_rows(query, lattice, tile, S)
        k = load_rows(key, lattice, there, S)
        k_term = per_key(score_terms, lattice, there, 0, S)
        if SECOND_ORDER:
            second = load_second_numbers(numbers, lattice, existing, 1, S)
            gq = load_rows(cot_query, lattice, tile, S)
            gk = load_rows(cot_key, lattice, there, S)
            k_x_term = per_key(x_terms, lattice, there, 0, S)
            scores, x = logits_and_x(
                q, k, row.term, k_term, gq, gk, second.term, k_x_term, queries, keys, table, cot_table, scale, lattice,
                False, S,
            )  # fmt: skip
            weights = tl.exp2(scores - row.base - row.log_sum)
            do = load_rows(grad_output, lattice, tile, S)
            v = load_rows(value, lattice, there, S)
            c = pair_products(do, v, False, S) - row.d
            gv = load_rows(cot_value, lattice, there, S)
            g = pair_products(do, gv, False, S) if gv is not None else None
            pairs += second_score_gradient(weights, x - second.r, c, g, second.t)
        else:
            scores = logits(q, k, row.term, k_term, queries, keys, table, scale, lattice, False, S)
            weights = tl.exp2(scores - row.base - row.log_sum)
            do = load_rows(grad_output, lattice, tile, S)
            v = load_rows(value, lattice, there, S)
            pairs += weights * (pair_products(do, v, False, S) - row.d)

        tile_x += 1
        tile_y += (tile_x == last_x).to(tl.int32)
        tile_x = tl.where(tile_x == last_x, first_x, tile_x)
        lattice_x += (tile_y == last_y).to(tl.int32)
        tile_y = tl.where(tile_y == last_y, first_y, tile_y)
        lattice_y += (lattice_x == window.columns).to(tl.int32)
        lattice_x = tl.where(lattice_x == window.columns, 0, lattice_x)
        batch += (lattice_y == window.rows).to(tl.int32)
        lattice_y = tl.where(lattice_y == window.rows, 0, lattice_y)

    here = sums + slot.to(tl.int64) * (COLUMNS * ROWS)
    index = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(here + index, _sum_equal_offsets(pairs, S))


@triton.jit
def table_parts_kernel(sums, parts, groups, SIZE: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr):
    """``WIDTH`` sums of one displacement: of all its programs, in a fixed order."""
    program = tl.program_id(0)
    group = program // (SIZE // WIDTH)
    first = tl.load(groups + group * 4)
    last = tl.load(groups + group * 4 + 1)
    element = program % (SIZE // WIDTH) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((AT_ONCE, WIDTH), sums.dtype.element_ty)
    for start in range(first, last, AT_ONCE):
        one = start + tl.arange(0, AT_ONCE)
        addresses = sums + one.to(tl.int64)[:, None] * SIZE + element[None, :]
        total += tl.load(addresses, mask=(one < last)[:, None], other=0.0)
    tl.store(parts + group * SIZE + element, tl.sum(total, 0))


@triton.jit(do_not_specialize=EXTENTS)
def table_sum_kernel(
    parts, grad_table, groups, first_groups,
    own_h, own_w, offset_rows, offset_columns, heads, table_rows, table_columns,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` entries of a head's table in one row: sums over all displacements, in order.

    It takes little time, so it is compiled once for all tiles.
    """
    program = tl.program_id(0)
    head = program % heads
    row = program // heads % table_rows
    column = program // heads // table_rows * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), parts.dtype.element_ty)
    for group in range(tl.load(first_groups + head), tl.load(first_groups + head + 1)):
        y = row - table_rows // 2 - tl.load(groups + group * 4 + 2) + own_h - 1
        x = column - table_columns // 2 - tl.load(groups + group * 4 + 3) + own_w - 1
        there = (y >= 0) & (y < offset_rows) & (x >= 0) & (x < offset_columns) & (column < table_columns)
        total += tl.load(parts + (group * offset_columns + x) * offset_rows + y, mask=there, other=0.0)
    tl.store(
        grad_table + (head * table_rows + row) * table_columns + column,
        total.to(grad_table.dtype.element_ty),
        mask=column < table_columns,
    )


@kept_on_device
def _work_on(device: torch.device, problem: Problem, tiles: Tiling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On a device: a row for every program, a row for every displacement, and the first of these of every head.

    A program's are head, first visit, visits, for each axis where the block starts from the tile, first tile and tiles,
    and where its sums go. Programs that visit the same tiles run at about the same time, for these to be in the cache.
    A displacement's are the place of its first program's sums, the one after its last, and where the block starts.
    """
    places = displacements(problem, tiles)
    total = sum(place.visits for place in places) * problem.batch
    share = max(min(VISITS, -(-total // FULL)), -(-total // MAX_PROGRAMS))
    programs, groups, first_groups = [], [], [0] * (problem.heads + 1)
    for place in places:
        visits = place.visits * problem.batch
        first = len(programs)
        for visit in range(0, visits, share):
            row = place.head, visit, min(share, visits - visit), *place.vertical, *place.horizontal, len(programs)
            programs.append((visit / visits, row))
        groups.append((first, len(programs), place.vertical.start, place.horizontal.start))
        first_groups[place.head + 1] = len(groups)
    work = [row for _, row in sorted(programs, key=lambda program: program[0])]
    return made_on(device, work), made_on(device, groups), made_on(device, first_groups)


def table_gradient(launch, step, table, cotangents, maps, numbers):
    """Gradient of the table, of which ``table`` is the padded copy: of the second order if the rows' numbers are."""
    bias = launch.table
    problem = launch.problem
    static, tiles, config = launch.static(step, QUERY)
    if problem.batch * problem.queries == 0:
        return bias.new_zeros(bias.shape)
    work, groups, first_groups = _work_on(launch.device, problem, tiles)
    rows, columns = (offset_extent(*pair) for pair in zip(tiles.own, tiles.block, strict=True))
    sums = numbers.new_empty((work.shape[0], columns * rows))
    arguments = *cotangents, *maps, numbers, sums, work, table, *launch.sizes(tiles.tiles)
    second = numbers.shape[-1] == SECOND.value
    launch.start(table_shares_kernel, len(sums), arguments, config, SECOND_ORDER=second, S=static)
    parts = numbers.new_empty((groups.shape[0], columns * rows))
    constants = {"SIZE": columns * rows, "WIDTH": SUM_WIDTH, "AT_ONCE": SUM_AT_ONCE}
    launch.start(table_parts_kernel, parts.numel() // SUM_WIDTH, (sums, parts, groups), SUM_CONFIG, **constants)
    grad = bias.new_empty(bias.shape)
    extents = *tiles.own, rows, columns, *bias.shape
    programs = bias.shape[0] * bias.shape[1] * -(-bias.shape[2] // SUM_WIDTH)
    launch.start(table_sum_kernel, programs, (parts, grad, groups, first_groups, *extents), SUM_CONFIG, WIDTH=SUM_WIDTH)
    return grad
