"""The gradient of a relative position table: sums of score gradients over equal offsets, in a fixed order.

A program owns a block of keys at one place relative to its tile of queries, and visits tiles of many images. So
every element of its [tile, block] accumulator stands for one offset throughout, and stays in registers; at the end
it is summed over equal offsets. Two small kernels sum the programs' results. Used by the backward and the double
backward.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import triton
import triton.language as tl

from .configs import Config
from .geometry import SIZES, X, Y, Z, lattice_at, split_index, tile_box, window_of
from .on_device import Lists
from .places import as_keys, as_queries, in_keys, not_beyond, own_place, within
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

EXTENTS = (
    "own_d", "own_h", "own_w", "offset_planes", "offset_rows", "offset_columns",
    "heads", "table_planes", "table_rows", "table_columns",
)  # fmt: skip

SUM_WIDTH = 32
SUM_AT_ONCE = 16
SUM_CONFIG = Config(own=1, block=SUM_WIDTH, warps=1, stages=1)

_offsets = triton.constexpr_function(offset_extent)


@triton.jit
def _at_offsets(pairs, OWN: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of [tile, others, block] over equal offsets on one axis: [others, offsets], index 0 being 1 - tile."""
    OFFSETS: tl.constexpr = _offsets(OWN, BLOCK)
    # Shift every query's keys to their offsets, then add the queries up.
    source = tl.arange(0, OFFSETS)[None, :] + (tl.arange(0, OWN) - (OWN - 1))[:, None]
    exists = (source >= 0) & (source < BLOCK)
    source = tl.where(exists, source, 0)[:, None]
    pairs = tl.gather(pairs, tl.broadcast_to(source, (OWN, pairs.shape[1], OFFSETS)), 2)
    return tl.sum(tl.where(exists[:, None], pairs, 0.0), 0)


@triton.jit
def _sum_equal_offsets(pairs, S: tl.constexpr):
    """Sums of [tile, block] over equal offsets, in the order [columns, rows, planes]."""
    COLUMNS: tl.constexpr = _offsets(S.own_w, S.block_w)
    ROWS: tl.constexpr = _offsets(S.own_h, S.block_h)
    PLANES: tl.constexpr = S.own_d * S.block_d  # those of pairs
    pairs = tl.reshape(pairs, (S.own_d, S.own_h, S.own_w, S.block_d, S.block_h, S.block_w))
    pairs = tl.reshape(tl.permute(pairs, (2, 0, 3, 1, 4, 5)), (S.own_w, PLANES * S.own_h * S.block_h, S.block_w))
    sums = tl.reshape(_at_offsets(pairs, S.own_w, S.block_w), (PLANES, S.own_h, S.block_h, COLUMNS))
    sums = tl.reshape(tl.permute(sums, (1, 0, 3, 2)), (S.own_h, PLANES * COLUMNS, S.block_h))
    sums = _at_offsets(sums, S.own_h, S.block_h)
    if S.deep:
        sums = tl.permute(tl.reshape(sums, (S.own_d, S.block_d, COLUMNS * ROWS)), (0, 2, 1))
        sums = _at_offsets(sums, S.own_d, S.block_d)
    return sums


class Displaced(NamedTuple):
    """Where the block starts from the first position of its tile, and which tiles are visited, on one axis."""

    start: object
    first: object
    last: object


@triton.jit
def _displaced(numbers, AXIS: tl.constexpr, S: tl.constexpr):
    if AXIS == Z and not S.deep:
        return Displaced(0, 0, 1)
    else:
        first = tl.load(numbers + 1)
        return Displaced(tl.load(numbers), first, first + tl.load(numbers + 2))


@triton.jit
def _carried(index, first, last, outer):
    """An index that has reached its end starts again, and the outer one goes on."""
    over = index == last
    return tl.where(over, first, index), outer + over.to(tl.int32)


@triton.jit(do_not_specialize=SIZES)
def table_shares_kernel(
    cot_query, cot_key, x_terms, cot_value, cot_table, grad_output, query, key, score_terms, value, numbers, sums, work,
    table, members,
    scale, heads, tiles, depth, height, width, window_z, window_y, window_x, table_planes, table_rows, table_columns,
    SECOND_ORDER: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One program's sums over its visits, which ``work`` lists (see ``_work_of``)."""
    OWN: tl.constexpr = S.own
    BLOCK: tl.constexpr = S.block
    COUNT: tl.constexpr = SECOND if SECOND_ORDER else FIRST
    work += tl.program_id(0) * 13
    head = tl.load(work)
    visit = tl.load(work + 1)
    visits = tl.load(work + 2)
    slot = tl.load(work + 3)
    on_z = _displaced(work + 4, Z, S)
    on_y = _displaced(work + 7, Y, S)
    on_x = _displaced(work + 10, X, S)
    window = window_of(head, members, depth, height, width, window_z, window_y, window_x, S)
    scale = number(scale, S)
    table = head_table(table, head, table_planes, table_rows, table_columns, S)
    if cot_table is not None:
        cot_table = head_table(cot_table, head, table_planes, table_rows, table_columns, S, 2)

    # Visits go along the tiles of a lattice, then over the lattices, then over images.
    tile_x = on_x.first + visit % (on_x.last - on_x.first)
    visit = visit // (on_x.last - on_x.first)
    tile_y = on_y.first + visit % (on_y.last - on_y.first)
    visit = visit // (on_y.last - on_y.first)
    tile_z = 0
    if S.deep:
        tile_z = on_z.first + visit % (on_z.last - on_z.first)
        visit = visit // (on_z.last - on_z.first)
    lattice_x = visit % window.x.lattices
    visit = visit // window.x.lattices
    lattice_y = visit % window.y.lattices
    visit = visit // window.y.lattices
    lattice_z = 0
    if S.deep:
        lattice_z = visit % window.z.lattices
        visit = visit // window.z.lattices
    batch = visit

    pairs = tl.zeros((OWN, BLOCK), S.accumulate)
    z, y, x = split_index(tl.arange(0, BLOCK), S.block_h, S.block_w, S)
    for _ in tl.range(visits, disable_licm=wide(S.chunks) and not S.streamed):
        lattice = lattice_at(batch, head, heads, lattice_z, lattice_y, lattice_x, window, depth, height, width, S)
        box = tile_box(lattice, tile_z, tile_y, tile_x, False, S)
        tile = own_place(box, S)
        queries = as_queries(tile, box, lattice, 1, S)
        there = in_keys(box.z.low + on_z.start + z, box.y.low + on_y.start + y, box.x.low + on_x.start + x, lattice, S)
        keys = as_keys(there, 0)
        existing = not_beyond(tile, box, S)
        row = load_numbers(numbers, lattice, existing, COUNT, 1, S)
        q = load_rows(query, lattice, tile, False, S)
        k = load_rows(key, lattice, there, True, S)
        k_term = per_key(score_terms, lattice, there, 0, S)
        if SECOND_ORDER:
            second = load_second_numbers(numbers, lattice, existing, 1, S)
            gq = load_rows(cot_query, lattice, tile, False, S)
            gk = load_rows(cot_key, lattice, there, True, S)
            k_x_term = per_key(x_terms, lattice, there, 0, S)
            scores, cot_scores = logits_and_x(
                q, k, row.term, k_term, gq, gk, second.term, k_x_term, queries, keys, table, cot_table, scale, False, S
            )
            weights = tl.exp2(scores - row.base - row.log_sum)
            do = load_rows(grad_output, lattice, tile, False, S)
            v = load_rows(value, lattice, there, True, S)
            c = pair_products(do, v, False, S) - row.d
            gv = load_rows(cot_value, lattice, there, True, S)
            g = pair_products(do, gv, False, S) if gv is not None else None
            pairs += second_score_gradient(weights, cot_scores - second.r, c, g, second.t)
        else:
            scores = logits(q, k, row.term, k_term, queries, keys, table, scale, False, S)
            weights = tl.exp2(scores - row.base - row.log_sum)
            do = load_rows(grad_output, lattice, tile, False, S)
            v = load_rows(value, lattice, there, True, S)
            pairs += weights * (pair_products(do, v, False, S) - row.d)

        tile_x, tile_y = _carried(tile_x + 1, on_x.first, on_x.last, tile_y)
        if S.deep:
            tile_y, tile_z = _carried(tile_y, on_y.first, on_y.last, tile_z)
            tile_z, lattice_x = _carried(tile_z, on_z.first, on_z.last, lattice_x)
        else:
            tile_y, lattice_x = _carried(tile_y, on_y.first, on_y.last, lattice_x)
        lattice_x, lattice_y = _carried(lattice_x, 0, window.x.lattices, lattice_y)
        if S.deep:
            lattice_y, lattice_z = _carried(lattice_y, 0, window.y.lattices, lattice_z)
            lattice_z, batch = _carried(lattice_z, 0, window.z.lattices, batch)
        else:
            lattice_y, batch = _carried(lattice_y, 0, window.y.lattices, batch)

    equal = _sum_equal_offsets(pairs, S)
    SIZE: tl.constexpr = equal.shape[0] * equal.shape[1]
    index = tl.arange(0, equal.shape[0])[:, None] * equal.shape[1] + tl.arange(0, equal.shape[1])[None, :]
    tl.store(sums + slot.to(tl.int64) * SIZE + index, equal)


@triton.jit
def table_parts_kernel(sums, parts, groups, SIZE: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr):
    """``WIDTH`` sums of one displacement: of all its programs, in a fixed order."""
    program = tl.program_id(0)
    group = program // (SIZE // WIDTH)
    first = tl.load(groups + group * 5)
    last = tl.load(groups + group * 5 + 1)
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
    own_d, own_h, own_w, offset_planes, offset_rows, offset_columns, heads, table_planes, table_rows, table_columns,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` entries of a head's table in one row: sums over all displacements, in order.

    It takes little time, so it is compiled once for all tiles.
    """
    program = tl.program_id(0)
    head = program % heads
    row = program // heads % table_rows
    plane = program // heads // table_rows % table_planes
    column = program // heads // table_rows // table_planes * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), parts.dtype.element_ty)
    for group in range(tl.load(first_groups + head), tl.load(first_groups + head + 1)):
        z = plane - table_planes // 2 - tl.load(groups + group * 5 + 2) + own_d - 1
        y = row - table_rows // 2 - tl.load(groups + group * 5 + 3) + own_h - 1
        x = column - table_columns // 2 - tl.load(groups + group * 5 + 4) + own_w - 1
        there = within(z, 0, offset_planes) & within(y, 0, offset_rows) & within(x, 0, offset_columns)
        there &= column < table_columns
        place = ((group * offset_columns + x) * offset_rows + y) * offset_planes + z
        total += tl.load(parts + place, mask=there, other=0.0)
    tl.store(
        grad_table + ((head * table_planes + plane) * table_rows + row) * table_columns + column,
        total.to(grad_table.dtype.element_ty),
        mask=column < table_columns,
    )


@functools.lru_cache(maxsize=8)  # it counts rows, and is then copied to a device
def _work_of(problem: Problem, tiles: Tiling) -> Lists:
    """A row for every program, a row for every displacement, and the first of these of every head.

    A program's are head, first visit, visits, where its sums go, and for each axis where the block starts from the
    tile, first tile and tiles. Programs that visit the same tiles run at about the same time, for these to be in the
    cache.
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
            row = place.head, visit, min(share, visits - visit), len(programs), *itertools.chain(*place.axes)
            programs.append((visit / visits, row))
        groups.append((first, len(programs), *(axis.start for axis in place.axes)))
        first_groups[place.head + 1] = len(groups)
    work = [row for _, row in sorted(programs, key=lambda program: program[0])]
    return work, groups, first_groups


def table_gradient(launch, step, table, cotangents, maps, numbers):
    """Gradient of the table, of which ``table`` is the padded copy: of the second order if the rows' numbers are."""
    bias = launch.table
    problem = launch.problem
    static, tiles, config = launch.static(step, QUERY)
    if problem.batch * problem.queries == 0:
        return launch.empty(bias.shape, bias.dtype, zero=True)
    work, groups, first_groups = launch.on_device(_work_of, problem, tiles)
    offsets = tuple(map(offset_extent, tiles.own, tiles.block))
    size = math.prod(offsets)
    sums = launch.empty((len(work), size))
    arguments = *cotangents, *maps, numbers, sums, work, table, *launch.sizes(tiles.tiles)
    second = numbers.shape[-1] == SECOND.value
    launch.start(table_shares_kernel, len(sums), arguments, config, SECOND_ORDER=second, S=static)
    parts = launch.empty((len(groups), size))
    constants = {"SIZE": size, "WIDTH": SUM_WIDTH, "AT_ONCE": SUM_AT_ONCE}
    launch.start(table_parts_kernel, parts.numel() // SUM_WIDTH, (sums, parts, groups), SUM_CONFIG, **constants)
    grad = launch.like(bias)
    planes, rows, columns = launch.table_shape
    extents = *tiles.own, *offsets, bias.shape[0], planes, rows, columns
    programs = bias.shape[0] * planes * rows * -(-columns // SUM_WIDTH)
    launch.start(table_sum_kernel, programs, (parts, grad, groups, first_groups, *extents), SUM_CONFIG, WIDTH=SUM_WIDTH)
    return grad
