"""Lattices, windows and tiles inside a kernel: the device side of ``problem.py``.

``first_key`` and ``key_count`` are the neighborhood rule of ``natten_ext.geometry``, for every kind of neighborhood.

Without ``Static.deep`` the map has a depth of 1, so that everything on the axis z is a constant, as are strides and
causal flags on axes that ``Static`` does not name: nothing of them is left in the compiled code.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ... import geometry

FULL = tl.constexpr(geometry.FULL)
GRID = tl.constexpr(geometry.GRID)
NEIGHBORHOOD = tl.constexpr(geometry.NEIGHBORHOOD)
Z, Y, X = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Integers that would otherwise compile a kernel again for the values 1 and multiples of 16. Those of the third axis are
# None without it: even parameters that nothing reads change how the assembler allots registers.
SIZES = (
    "scale", "heads", "tiles", "depth", "height", "width", "window_z", "window_y", "window_x",
    "table_planes", "table_rows", "table_columns",
)  # fmt: skip


class AxisWindow(NamedTuple):
    """Window and step of a head on one axis, and how many lattices there are, the longest with ``across`` queries."""

    size: object
    step: object
    stride: object
    causal: object  # 1 or 0
    lattices: object
    across: object


class Window(NamedTuple):
    """Of a head."""

    z: AxisWindow
    y: AxisWindow
    x: AxisWindow


class Axis(NamedTuple):
    """One axis of a lattice: its positions are the pixels ``origin + step * position``."""

    origin: object
    step: object
    queries: object
    keys: object
    window: object
    stride: object
    causal: object


class Lattice(NamedTuple):
    """One of an image and a head."""

    batch: object
    head: object
    queries: object  # of an image and head
    first_query: object  # index of the image's and head's first row in a tensor (batch, heads, depth, height, width)
    first_key: object
    height: object  # of a map of queries
    width: object
    keys_width: object
    z: Axis
    y: Axis
    x: Axis


@triton.jit
def pixel_of(position, axis):
    return axis.origin + position * axis.step


class Range(NamedTuple):
    """Positions from ``low`` to ``high - 1``."""

    low: object
    high: object


class Box(NamedTuple):
    z: Range
    y: Range
    x: Range


@triton.constexpr_function
def _of_axis(flags, axis):
    return flags[axis]


@triton.jit
def _axis_window(head, members, extent, window, AXIS: tl.constexpr, S: tl.constexpr):
    if AXIS == Z and not S.deep:
        return AxisWindow(1, 1, 1, 0, 1, 1)
    elif S.kind == NEIGHBORHOOD:
        member = members + head * 12 + AXIS * 4
        step = tl.load(member + 1)
        stride = tl.load(member + 2) if _of_axis(S.strided, AXIS) else 1
        causal = tl.load(member + 3) if _of_axis(S.causal, AXIS) else 0
        return AxisWindow(tl.load(member), step, stride, causal, step, tl.cdiv(extent, step))
    elif S.kind == GRID and not S.packed:
        return AxisWindow(window, 1, 1, 0, extent // window, window)
    else:
        return AxisWindow(window, 1, 1, 0, 1, extent)


@triton.jit
def window_of(head, members, depth, height, width, window_z, window_y, window_x, S: tl.constexpr):
    return Window(
        _axis_window(head, members, depth, window_z, Z, S),
        _axis_window(head, members, height, window_y, Y, S),
        _axis_window(head, members, width, window_x, X, S),
    )


@triton.jit
def _axis_at(index, extent, window, AXIS: tl.constexpr, S: tl.constexpr):
    """An axis of the lattice that is number ``index`` on it."""
    if AXIS == Z and not S.deep:
        return Axis(0, 1, 1, 1, 1, 1, 0)
    else:
        origin = index
        queries = extent
        if S.kind == NEIGHBORHOOD:
            queries = extent // window.step + (index < extent % window.step).to(tl.int32)
        elif S.kind == GRID and not S.packed:
            origin = index * window.size
            queries = window.size
        keys = queries
        if S.kind == FULL and AXIS == X:
            keys = window.size
        return Axis(origin, window.step, queries, keys, window.size, window.stride, window.causal)


@triton.jit
def lattice_at(batch, head, heads, index_z, index_y, index_x, window, depth, height, width, S: tl.constexpr):
    """The lattice of one residue class, or one window."""
    queries = height * width
    if S.deep:
        queries *= depth
    image = batch.to(tl.int64) * heads + head
    first_query = image * queries
    first_key = first_query
    key_image = image
    if S.shared > 1:
        key_image = image // S.shared
        first_key = key_image * queries
    keys_width = width
    if S.kind == FULL:
        keys_width = window.x.size
        first_key = key_image * keys_width
    return Lattice(
        batch, head, queries, first_query, first_key, height, width, keys_width,
        _axis_at(index_z, depth, window.z, Z, S),
        _axis_at(index_y, height, window.y, Y, S),
        _axis_at(index_x, width, window.x, X, S),
    )  # fmt: skip


@triton.jit
def turn_of(lattice, step, blocks, S: tl.constexpr):
    """What a walk over the queries of all heads that share a key head meets: the lattice of one of them, and a block.

    ``lattice`` is that of the first head. They take turns, each with all its ``blocks``.
    """
    if S.shared == 1:
        return lattice, step
    else:
        number = step // blocks
        head = lattice.head + number
        first_query = lattice.first_query + number.to(tl.int64) * lattice.queries
        of_head = Lattice(
            lattice.batch, head, lattice.queries, first_query, lattice.first_key, lattice.height, lattice.width,
            lattice.keys_width, lattice.z, lattice.y, lattice.x,
        )  # fmt: skip
        return of_head, step % blocks


@triton.jit
def _tile_range(tile, axis, OWN: tl.constexpr, KEYS: tl.constexpr):
    low = tile * OWN
    return Range(low, tl.minimum(low + OWN, axis.keys if KEYS else axis.queries))


@triton.jit
def tile_box(lattice, tile_z, tile_y, tile_x, KEYS: tl.constexpr, S: tl.constexpr):
    """Queries (or, with KEYS, keys) of a tile, none if the lattice has no such tile."""
    return Box(
        _tile_range(tile_z, lattice.z, S.own_d, KEYS) if S.deep else Range(0, 1),
        _tile_range(tile_y, lattice.y, S.own_h, KEYS),
        _tile_range(tile_x, lattice.x, S.own_w, KEYS),
    )


@triton.jit
def split_index(index, rows, columns, S: tl.constexpr):
    """(z, y, x) of an index into planes of so many rows and columns."""
    row = index // columns
    if S.deep:
        return row // rows, row % rows, index % columns
    else:
        return row * 0, row, index % columns


@triton.jit
def own_tile(
    heads, tiles, members, depth, height, width, window_z, window_y, window_x, KEYS: tl.constexpr, S: tl.constexpr
):
    """Lattice of this program's tile, and the box of queries (or, with KEYS, of keys) in it, empty if there is none.

    Keys have programs for every head of theirs; the lattice is that of the first head that shares it.
    """
    program = tl.program_id(0)
    own_heads = heads
    if KEYS and S.shared > 1:
        own_heads = heads // S.shared
    head = program % own_heads
    batch = program // own_heads // tiles
    tile = program // own_heads % tiles
    if KEYS and S.shared > 1:
        head *= S.shared
    window = window_of(head, members, depth, height, width, window_z, window_y, window_x, S)
    tiles_x = tl.cdiv(window_x if S.kind == FULL and KEYS else window.x.across, S.own_w)
    tiles_y = tl.cdiv(window.y.across, S.own_h)
    instances = window.y.lattices * window.x.lattices
    if S.deep:
        instances *= window.z.lattices
    index_z, index_y, index_x = split_index(tile % instances, window.y.lattices, window.x.lattices, S)
    tile_z, tile_y, tile_x = split_index(tile // instances, tiles_y, tiles_x, S)
    lattice = lattice_at(batch, head, heads, index_z, index_y, index_x, window, depth, height, width, S)
    return lattice, tile_box(lattice, tile_z, tile_y, tile_x, KEYS, S)


@triton.jit
def empty(box):
    return (box.z.low >= box.z.high) | (box.y.low >= box.y.high) | (box.x.low >= box.x.high)


@triton.jit
def _shift(axis):
    """Where the window of a stride group starts from the first query of the group, if no border is near."""
    return tl.where(axis.causal != 0, axis.stride - axis.window, axis.stride // 2 - axis.window // 2)


@triton.jit
def first_key(query, axis, S: tl.constexpr):
    """First key that a query sees on one axis."""
    if S.kind == NEIGHBORHOOD:
        start = query - query % axis.stride + _shift(axis)
        return tl.maximum(tl.minimum(start, axis.queries - axis.window), 0)
    elif S.packed:
        return query // axis.window * axis.window
    else:
        return query * 0


@triton.jit
def key_count(query, start, axis):
    """How many keys a query sees on one axis, from ``start`` on."""
    return tl.where(axis.causal != 0, query + 1 - start, axis.window)


@triton.jit
def _keys_of(queries, axis, S: tl.constexpr):
    last = queries.high - 1
    start = first_key(last, axis, S)
    return Range(first_key(queries.low, axis, S), start + key_count(last, start, axis))


@triton.jit
def keys_of(box, lattice, S: tl.constexpr):
    """Box of the keys that a box of queries sees."""
    return Box(
        _keys_of(box.z, lattice.z, S) if S.deep else Range(0, 1),
        _keys_of(box.y, lattice.y, S),
        _keys_of(box.x, lattice.x, S),
    )


@triton.jit
def _queries_of(keys, axis, S: tl.constexpr):
    """Range of the queries that see any of the keys on one axis."""
    first = keys.low
    last = keys.high - 1
    if S.kind == NEIGHBORHOOD:
        low = tl.cdiv(first - axis.window + 1 - _shift(axis), axis.stride) * axis.stride
        low = tl.where(first < axis.window, 0, low)
        low = tl.where(axis.causal != 0, first, low)
        # Not beyond the last query, for a stride is at most the window.
        high = ((last - _shift(axis)) // axis.stride + 1) * axis.stride
        high = tl.where(last >= axis.queries - axis.window, axis.queries, high)
    elif S.kind == GRID:
        low = first // axis.window * axis.window
        high = (last // axis.window + 1) * axis.window
    else:
        low = first * 0
        high = low + axis.queries
    return Range(low, high)


@triton.jit
def queries_of(box, lattice, S: tl.constexpr):
    """Box of the queries that see a box of keys: the inverse of ``keys_of``."""
    return Box(
        _queries_of(box.z, lattice.z, S) if S.deep else Range(0, 1),
        _queries_of(box.y, lattice.y, S),
        _queries_of(box.x, lattice.x, S),
    )
