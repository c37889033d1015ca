"""Relative position tables as the kernels read them: one number per pair, and no mask.

A table is copied once per pass into the dtype of sums, with a row and a column more for what a query does not see. So
the entry of a pair is one load that needs no condition, and its mask as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configs import Config
from .launch import Launch
from .places import sees
from .tiles import LOG2E

WIDTH = 64
CONFIG = Config(own=1, block=WIDTH, warps=1, stages=1)


@triton.constexpr_function
def _most(dtype):
    """Half of the largest number, so that a sum with a product does not overflow."""
    return 2.0**1023 if dtype == tl.float64 else 2.0**127


@triton.jit(do_not_specialize=("heads", "table_planes", "table_rows", "table_columns"))
def padded_table_kernel(
    table, cot_table, padded, heads, table_planes, table_rows, table_columns, DEEP: tl.constexpr, WIDTH: tl.constexpr
):
    """``WIDTH`` entries of a row of a head's table, or of the row below or the plane behind, and of the column beside.

    Entries are times log2(e), finite ones at most half of the largest number, and minus infinity outside. Beside each
    is that of the cotangent of the table's gradient, if there is one, which is zero outside.
    """
    TYPE: tl.constexpr = padded.dtype.element_ty
    program = tl.program_id(0)
    head = program % heads
    row = program // heads % (table_rows + 1)
    part = program // heads // (table_rows + 1)
    source_plane = head
    target_plane = head
    inside = row < table_rows
    if DEEP:
        plane = part % (table_planes + 1)
        part = part // (table_planes + 1)
        source_plane = head * table_planes + plane
        target_plane = head * (table_planes + 1) + plane
        inside &= plane < table_planes
    column = part * WIDTH + tl.arange(0, WIDTH)
    inside = inside & (column < table_columns)
    source = (source_plane * table_rows + row) * table_columns + column
    target = (target_plane * (table_rows + 1) + row) * (table_columns + 1) + column
    entries = tl.load(table + source, mask=inside, other=0.0).to(TYPE)
    scaled = entries * LOG2E
    MOST: tl.constexpr = _most(TYPE)
    scaled = tl.where(tl.abs(entries) < float("inf"), tl.minimum(tl.maximum(scaled, -MOST), MOST), scaled)
    scaled = tl.where(inside, scaled, float("-inf"))
    if cot_table is None:
        tl.store(padded + target, scaled, mask=column <= table_columns)
    else:
        cot_entries = tl.load(cot_table + source, mask=inside, other=0.0).to(TYPE)
        tl.store(padded + 2 * target, scaled, mask=column <= table_columns)
        tl.store(padded + 2 * target + 1, cot_entries, mask=column <= table_columns)


def padded_table(launch: Launch, cot_table: torch.Tensor | None = None) -> torch.Tensor | None:
    """The problem's table as kernels read it (see ``padded_table_kernel``); None for none."""
    table = launch.table
    if table is None:
        return None
    deep = launch.problem.deep
    planes, rows, columns = launch.table_shape
    lines = table.shape[0] * (planes + deep) * (rows + 1)
    paired = () if cot_table is None else (2,)
    padded = launch.empty((lines, columns + 1, *paired))
    arguments = table, cot_table, padded, table.shape[0], *launch.table_shape
    programs = lines * -(-(columns + 1) // WIDTH)
    launch.start(padded_table_kernel, programs, arguments, CONFIG, DEEP=deep, WIDTH=WIDTH)
    return padded


class Table(NamedTuple):
    """A head's padded table: address of the offset zero, entries of a plane and of a row, and how far from there the
    padding is on each axis."""

    centre: object
    plane: object
    width: object
    behind: object
    below: object
    beside: object


@triton.jit
def head_table(padded, head, planes, rows, columns, S: tl.constexpr, COUNT: tl.constexpr = 1):
    """The table of a head, with ``COUNT`` numbers per entry; None of None."""
    if padded is None:
        return
    else:
        width = columns + 1
        plane = (rows + 1) * width
        behind = 0
        middle = head
        if S.deep:
            behind = (planes - planes // 2) * plane
            middle = head * (planes + 1) + planes // 2
        centre = padded + ((middle * (rows + 1) + rows // 2) * width + columns // 2) * COUNT
        return Table(centre, plane, width, behind, (rows - rows // 2) * width, columns - columns // 2)


@triton.jit
def table_in_turn(first, padded, head, planes, rows, columns, S: tl.constexpr, COUNT: tl.constexpr = 1):
    """The table of one of the heads that share a key head, of which ``first`` is the first head's; None of None."""
    if padded is None:  # the compiler returns no variable that is None
        return
    elif S.shared == 1:
        return first
    else:
        return head_table(padded, head, planes, rows, columns, S, COUNT)


@triton.jit
def _place_of(table, queries, keys, S: tl.constexpr):
    """Where the entry of every pair lies, from the centre."""
    if S.whole:
        of_keys = keys.y * table.width + keys.x
        of_queries = queries.y.position * table.width + queries.x.position
        if S.deep:
            of_keys += keys.z * table.plane
            of_queries += queries.z.position * table.plane
        return of_keys - of_queries
    row = tl.where(sees(queries.y, keys.y), (keys.y - queries.y.position) * table.width, table.below)
    column = tl.where(sees(queries.x, keys.x), keys.x - queries.x.position, table.beside)
    place = row + column
    if S.deep:
        place += tl.where(sees(queries.z, keys.z), (keys.z - queries.z.position) * table.plane, table.behind)
    return place


@triton.jit
def entries_of(table, queries, keys, S: tl.constexpr):
    """Entries for every pair.

    The load is written as what it is on the device, an operation on each element: of others Triton chooses the layout,
    and moves the results to that of the products through shared memory.
    """
    addresses = table.centre + _place_of(table, queries, keys, S)
    if S.interpreted:
        return tl.load(addresses)
    elif S.accumulate == tl.float64:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f64 $0, [$1];", "=d,l", [addresses.to(tl.int64)], tl.float64, True, 1
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [addresses.to(tl.int64)], tl.float32, True, 1
        )


@triton.jit
def entry_pairs_of(table, queries, keys, S: tl.constexpr):
    """Likewise entries of a table and of the cotangent beside it."""
    addresses = table.centre + _place_of(table, queries, keys, S) * 2
    if S.interpreted:
        return tl.load(addresses), tl.load(addresses + 1)
    elif S.accumulate == tl.float64:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v2.f64 {$0, $1}, [$2];",
            "=d,=d,l",
            [addresses.to(tl.int64)],
            (tl.float64, tl.float64),
            True,
            1,
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v2.f32 {$0, $1}, [$2];",
            "=f,=f,l",
            [addresses.to(tl.int64)],
            (tl.float32, tl.float32),
            True,
            1,
        )
