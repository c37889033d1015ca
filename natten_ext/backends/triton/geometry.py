"""Lattices, windows and tiles inside a kernel: the device side of ``problem.py``.

``class_window_start`` is the neighborhood rule of ``natten_ext.geometry``, for every kind of neighborhood.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ... import geometry

FULL = tl.constexpr(geometry.FULL)
GRID = tl.constexpr(geometry.GRID)
NEIGHBORHOOD = tl.constexpr(geometry.NEIGHBORHOOD)
FAR = tl.constexpr(1 << 30)  # a window start that no key reaches

# Integers that would otherwise compile a kernel again for the values 1 and multiples of 16.
SIZES = ("scale", "heads", "tiles", "height", "width", "window_y", "window_x", "table_rows", "table_columns")


class Lattice(NamedTuple):
    """One of an image and a head: its positions ``(y, x)`` are the pixels ``origin + step * position``."""

    batch: object
    head: object
    first_query: object  # index of the image's and head's first row in a tensor (batch, heads, height, width)
    first_key: object
    width: object  # of a map of queries
    keys_width: object
    origin_y: object
    origin_x: object
    step_y: object
    step_x: object
    queries_y: object  # queries on each axis
    queries_x: object
    keys_y: object  # keys on each axis
    keys_x: object
    window_y: object
    window_x: object


class Box(NamedTuple):
    """Positions from ``low`` to ``high - 1`` on each axis."""

    low_y: object
    low_x: object
    high_y: object
    high_x: object


class Place(NamedTuple):
    """Positions of a tile's elements, one by one, and which of them exist."""

    y: object
    x: object
    valid: object


class Window(NamedTuple):
    """Window and step of a head, and how many lattices there are on each axis."""

    y: object
    x: object
    step_y: object
    step_x: object
    rows: object
    columns: object


@triton.jit
def window_of(head, members, height, width, window_y, window_x, S: tl.constexpr):
    if S.kind == NEIGHBORHOOD:
        member = members + head * 4
        step_y = tl.load(member + 2)
        step_x = tl.load(member + 3)
        return Window(tl.load(member), tl.load(member + 1), step_y, step_x, step_y, step_x)
    elif S.kind == GRID and not S.packed:
        return Window(window_y, window_x, 1, 1, height // window_y, width // window_x)
    else:
        return Window(window_y, window_x, 1, 1, 1, 1)


@triton.jit
def lattice_at(batch, head, heads, row, column, window, height, width, S: tl.constexpr):
    """The lattice of one residue class, or one window."""
    first_query = (batch.to(tl.int64) * heads + head) * height * width
    first_key = first_query
    origin_y = row
    origin_x = column
    queries_y = height
    queries_x = width
    if S.kind == NEIGHBORHOOD:
        queries_y = height // window.step_y + (row < height % window.step_y).to(tl.int32)
        queries_x = width // window.step_x + (column < width % window.step_x).to(tl.int32)
    elif S.kind == GRID and not S.packed:
        origin_y = row * window.y
        origin_x = column * window.x
        queries_y = window.y
        queries_x = window.x
    keys_x = queries_x
    keys_width = width
    if S.kind == FULL:
        keys_x = window.x
        keys_width = window.x
        first_key = (batch.to(tl.int64) * heads + head) * keys_width
    return Lattice(
        batch, head, first_query, first_key, width, keys_width, origin_y, origin_x, window.step_y, window.step_x,
        queries_y, queries_x, queries_y, keys_x, window.y, window.x,
    )  # fmt: skip


@triton.jit
def tile_box(lattice, tile_y, tile_x, KEYS: tl.constexpr, S: tl.constexpr):
    """Queries (or, with KEYS, keys) of a tile, none if the lattice has no such tile."""
    low_y = tile_y * S.own_h
    low_x = tile_x * S.own_w
    high_y = tl.minimum(low_y + S.own_h, lattice.keys_y if KEYS else lattice.queries_y)
    high_x = tl.minimum(low_x + S.own_w, lattice.keys_x if KEYS else lattice.queries_x)
    return Box(low_y, low_x, high_y, high_x)


@triton.jit
def own_tile(heads, tiles, members, height, width, window_y, window_x, KEYS: tl.constexpr, S: tl.constexpr):
    """Lattice of this program's tile, and the box of queries (or, with KEYS, of keys) in it, empty if there is none."""
    program = tl.program_id(0)
    head = program % heads
    batch = program // heads // tiles
    tile = program // heads % tiles
    window = window_of(head, members, height, width, window_y, window_x, S)
    across_x = width
    if S.kind == NEIGHBORHOOD:
        across_x = tl.cdiv(width, window.step_x)
    elif (S.kind == GRID and not S.packed) or (S.kind == FULL and KEYS):
        across_x = window_x
    tiles_x = tl.cdiv(across_x, S.own_w)
    instances = window.rows * window.columns
    instance = tile % instances
    part = tile // instances
    row = instance // window.columns
    lattice = lattice_at(batch, head, heads, row, instance % window.columns, window, height, width, S)
    return lattice, tile_box(lattice, part // tiles_x, part % tiles_x, KEYS, S)


@triton.jit
def empty(box):
    return (box.low_y >= box.high_y) | (box.low_x >= box.high_x)


@triton.jit
def class_window_start(query, length, window, S: tl.constexpr):
    """First key that a query sees on one axis."""
    if S.kind == NEIGHBORHOOD:
        return tl.maximum(tl.minimum(query - window // 2, length - window), 0)
    elif S.packed:
        return query // window * window
    else:
        return query * 0


@triton.jit
def _queries_of(first, last, length, window, S: tl.constexpr):
    """Range of the queries that see any of the keys ``first ... last`` on one axis."""
    if S.kind == NEIGHBORHOOD:
        half = window // 2
        low = tl.where(first < window, 0, first - window + 1 + half)
        high = tl.where(last >= length - window, length, last + half + 1)
    elif S.kind == GRID:
        low = first // window * window
        high = (last // window + 1) * window
    else:
        low = first * 0
        high = first * 0 + length
    return low, high


@triton.jit
def keys_of(box, lattice, S: tl.constexpr):
    """Box of the keys that a box of queries sees."""
    low_y = class_window_start(box.low_y, lattice.queries_y, lattice.window_y, S)
    low_x = class_window_start(box.low_x, lattice.queries_x, lattice.window_x, S)
    high_y = class_window_start(box.high_y - 1, lattice.queries_y, lattice.window_y, S) + lattice.window_y
    high_x = class_window_start(box.high_x - 1, lattice.queries_x, lattice.window_x, S) + lattice.window_x
    return Box(low_y, low_x, high_y, high_x)


@triton.jit
def queries_of(box, lattice, S: tl.constexpr):
    """Box of the queries that see a box of keys: the inverse of ``keys_of``."""
    low_y, high_y = _queries_of(box.low_y, box.high_y - 1, lattice.queries_y, lattice.window_y, S)
    low_x, high_x = _queries_of(box.low_x, box.high_x - 1, lattice.queries_x, lattice.window_x, S)
    return Box(low_y, low_x, high_y, high_x)


@triton.jit
def place_in(box, y, x, S: tl.constexpr):
    """The positions, valid up to the end of a box."""
    if S.whole:
        return Place(y, x, tl.full(y.shape, True, tl.int1))
    else:
        return Place(y, x, (y < box.high_y) & (x < box.high_x))


@triton.jit
def in_keys(y, x, lattice, S: tl.constexpr):
    """The positions, valid where they are a key's."""
    if S.whole:
        return Place(y, x, tl.full(y.shape, True, tl.int1))
    else:
        return Place(y, x, within(y, 0, lattice.keys_y) & within(x, 0, lattice.keys_x))


@triton.jit
def own_place(box, S: tl.constexpr):
    """Places of a program's own tile."""
    element = tl.arange(0, S.own_h * S.own_w)
    return place_in(box, box.low_y + element // S.own_w, box.low_x + element % S.own_w, S)


@triton.jit
def not_beyond(place, box, S: tl.constexpr):
    """The places, those beyond the box moved to its last row and column."""
    if S.whole:
        return place
    return Place(tl.minimum(place.y, box.high_y - 1), tl.minimum(place.x, box.high_x - 1), place.valid)


@triton.jit
def in_lattice(place, lattice, S: tl.constexpr):
    """The places, those that are no key's moved to one that is."""
    if S.whole:
        return place
    y = tl.minimum(tl.maximum(place.y, 0), lattice.keys_y - 1)
    x = tl.minimum(tl.maximum(place.x, 0), lattice.keys_x - 1)
    return Place(y, x, place.valid)


@triton.jit
def own_keys(place, lattice):
    """Places of keys near the queries of a tile: at their own positions, if there are as many."""
    return Place(place.y, tl.minimum(place.x, lattice.keys_x - 1), place.valid)


@triton.jit
def block_columns(box, S: tl.constexpr):
    return tl.cdiv(box.high_x - box.low_x, S.block_w)


@triton.jit
def block_count(box, S: tl.constexpr):
    """Blocks that cover a box."""
    return tl.cdiv(box.high_y - box.low_y, S.block_h) * block_columns(box, S)


@triton.jit
def block_place(box, block, S: tl.constexpr):
    """Places of one of the blocks that cover a box."""
    element = tl.arange(0, S.block_h * S.block_w)
    columns = block_columns(box, S)
    y = box.low_y + block // columns * S.block_h + element // S.block_w
    x = box.low_x + block % columns * S.block_w + element % S.block_w
    return place_in(box, y, x, S)


class Queries(NamedTuple):
    """What decides which keys a query sees, laid out along one axis of the scores."""

    y: object
    x: object
    start_y: object
    start_x: object


class Keys(NamedTuple):
    valid: object
    y: object
    x: object


@triton.jit
def as_queries(place, box, lattice, AXIS: tl.constexpr, S: tl.constexpr):
    """Queries along axis 1 - AXIS of the scores. Those beyond the box see nothing."""
    start_y = tl.where(place.y < box.high_y, class_window_start(place.y, lattice.queries_y, lattice.window_y, S), FAR)
    start_x = tl.where(place.x < box.high_x, class_window_start(place.x, lattice.queries_x, lattice.window_x, S), FAR)
    return Queries(
        tl.expand_dims(place.y, AXIS),
        tl.expand_dims(place.x, AXIS),
        tl.expand_dims(start_y, AXIS),
        tl.expand_dims(start_x, AXIS),
    )


@triton.jit
def as_keys(place, AXIS: tl.constexpr):
    """Keys along axis 1 - AXIS of the scores."""
    return Keys(tl.expand_dims(place.valid, AXIS), tl.expand_dims(place.y, AXIS), tl.expand_dims(place.x, AXIS))


@triton.jit
def within(key, start, window):
    """Whether keys are in windows, on one axis."""
    return (key - start).to(tl.uint32, bitcast=True) < window.to(tl.uint32, bitcast=True)


@triton.jit
def visible(queries, keys, lattice):
    """Which query sees which key."""
    return within(keys.y, queries.start_y, lattice.window_y) & within(keys.x, queries.start_x, lattice.window_x)
