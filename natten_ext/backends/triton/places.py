"""Positions of the elements of tiles and blocks, inside a kernel, and which query sees which key."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .geometry import first_key, key_count, split_index

FAR = tl.constexpr(1 << 30)  # a window start that no key reaches


class Place(NamedTuple):
    """Positions of a tile's elements, one by one, and which of them exist."""

    z: object
    y: object
    x: object
    valid: object


@triton.jit
def place_in(box, z, y, x, S: tl.constexpr):
    """The positions, valid up to the end of a box."""
    if S.whole:
        return Place(z, y, x, tl.full(y.shape, True, tl.int1))
    else:
        valid = (y < box.y.high) & (x < box.x.high)
        if S.deep:
            valid &= z < box.z.high
        return Place(z, y, x, valid)


@triton.jit
def in_keys(z, y, x, lattice, S: tl.constexpr):
    """The positions, valid where they are a key's."""
    if S.whole:
        return Place(z, y, x, tl.full(y.shape, True, tl.int1))
    else:
        valid = within(y, 0, lattice.y.keys) & within(x, 0, lattice.x.keys)
        if S.deep:
            valid &= within(z, 0, lattice.z.keys)
        return Place(z, y, x, valid)


@triton.jit
def own_place(box, S: tl.constexpr):
    """Places of a program's own tile."""
    z, y, x = split_index(tl.arange(0, S.own), S.own_h, S.own_w, S)
    return place_in(box, box.z.low + z, box.y.low + y, box.x.low + x, S)


@triton.jit
def not_beyond(place, box, S: tl.constexpr):
    """The places, those beyond the box moved to its last plane, row and column."""
    if S.whole:
        return place
    return Place(
        tl.minimum(place.z, box.z.high - 1),
        tl.minimum(place.y, box.y.high - 1),
        tl.minimum(place.x, box.x.high - 1),
        place.valid,
    )


@triton.jit
def _on_axis(position, axis):
    return tl.minimum(tl.maximum(position, 0), axis.keys - 1)


@triton.jit
def in_lattice(place, lattice, S: tl.constexpr):
    """The places, those that are no key's moved to one that is."""
    if S.whole:
        return place
    return Place(_on_axis(place.z, lattice.z), _on_axis(place.y, lattice.y), _on_axis(place.x, lattice.x), place.valid)


@triton.jit
def own_keys(place, lattice):
    """Places of keys near the queries of a tile: at their own positions, if there are as many."""
    return Place(place.z, place.y, tl.minimum(place.x, lattice.x.keys - 1), place.valid)


@triton.jit
def _blocks(positions, BLOCK: tl.constexpr):
    """Blocks that cover a range."""
    return tl.cdiv(positions.high - positions.low, BLOCK)


@triton.jit
def block_count(box, S: tl.constexpr):
    """Blocks that cover a box."""
    count = _blocks(box.y, S.block_h) * _blocks(box.x, S.block_w)
    if S.deep:
        count *= _blocks(box.z, S.block_d)
    return count


@triton.jit
def steps_of(blocks, S: tl.constexpr):
    """Of a walk over the blocks of all heads that share a key head (``turn_of``)."""
    return blocks if S.shared == 1 else blocks * S.shared


@triton.jit
def block_place(box, block, S: tl.constexpr):
    """Places of one of the blocks that cover a box."""
    block_z, block_y, block_x = split_index(block, _blocks(box.y, S.block_h), _blocks(box.x, S.block_w), S)
    z, y, x = split_index(tl.arange(0, S.block), S.block_h, S.block_w, S)
    return place_in(
        box,
        box.z.low + block_z * S.block_d + z,
        box.y.low + block_y * S.block_h + y,
        box.x.low + block_x * S.block_w + x,
        S,
    )


class Seen(NamedTuple):
    """Queries on one axis, and the keys that they see: ``count`` from ``start`` on."""

    position: object
    start: object
    count: object


class Queries(NamedTuple):
    """Queries laid out along one axis of the scores."""

    z: Seen
    y: Seen
    x: Seen


class Keys(NamedTuple):
    """Keys laid out along one axis of the scores."""

    valid: object
    z: object
    y: object
    x: object


@triton.jit
def _seen(position, box, axis, AXIS: tl.constexpr, S: tl.constexpr):
    start = first_key(position, axis, S)
    count = key_count(position, start, axis)
    start = tl.where(position < box.high, start, FAR)
    return Seen(tl.expand_dims(position, AXIS), tl.expand_dims(start, AXIS), tl.expand_dims(count, AXIS))


@triton.jit
def as_queries(place, box, lattice, AXIS: tl.constexpr, S: tl.constexpr):
    """Queries along axis 1 - AXIS of the scores. Those beyond the box see nothing."""
    return Queries(
        _seen(place.z, box.z, lattice.z, AXIS, S),
        _seen(place.y, box.y, lattice.y, AXIS, S),
        _seen(place.x, box.x, lattice.x, AXIS, S),
    )


@triton.jit
def as_keys(place, AXIS: tl.constexpr):
    """Keys along axis 1 - AXIS of the scores."""
    return Keys(
        tl.expand_dims(place.valid, AXIS),
        tl.expand_dims(place.z, AXIS),
        tl.expand_dims(place.y, AXIS),
        tl.expand_dims(place.x, AXIS),
    )


@triton.jit
def within(key, start, count):
    """Whether keys are among ``count`` from ``start`` on, on one axis."""
    return (key - start).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit
def sees(query, key):
    """Which query sees which key, on one axis."""
    return within(key, query.start, query.count)


@triton.jit
def visible(queries, keys, S: tl.constexpr):
    """Which query sees which key."""
    seen = sees(queries.y, keys.y) & sees(queries.x, keys.x)
    return sees(queries.z, keys.z) & seen if S.deep else seen
