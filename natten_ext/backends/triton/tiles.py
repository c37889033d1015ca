"""Rows of channels inside a kernel: loads, stores and products.

A head's channels are held as a tuple of chunks whose widths are powers of two (72 channels are 64 and 16), so that
little is computed on padding. Where a whole row does not fit the registers, the problem is `streamed`: products over
the channels load both sides chunk by chunk, each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from .geometry import pixel_of
from .places import own_keys

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TOTALS = tl.constexpr(16)  # columns of totals: the narrowest product


@dataclass(frozen=True)
class Static:
    """What a kernel is compiled for."""

    kind: int
    deep: bool  # the map has a third axis
    strided: tuple[bool, ...]  # on which axes some head has a stride
    causal: tuple[bool, ...]  # or causal windows
    packed: bool  # windows of a grid share one lattice
    exact: bool  # every query of a lattice sees every key
    whole: bool  # and tiles and blocks fit the lattice: nothing is masked
    l2: bool
    shared: int  # heads to a key head
    head_dim: int
    align: int  # what all strides are multiples of
    chunks: tuple[int, ...]
    streamed: bool
    own_d: int
    own_h: int
    own_w: int
    block_d: int
    block_h: int
    block_w: int
    precision: str
    accumulate: object
    interpreted: bool

    @property
    def own(self) -> int:
        """Positions of a tile."""
        return self.own_d * self.own_h * self.own_w

    @property
    def block(self) -> int:
        """Positions of a block."""
        return self.block_d * self.block_h * self.block_w


class Rows(NamedTuple):
    """A tensor ``(batch, depth, height, width, heads, head_dim)`` with contiguous channels: address and strides.

    In a kernel the strides are in units of ``Static.align``, from which the compiler sees how wide it can load. ``z``
    is an empty tuple unless the map has a third axis.
    """

    pointer: object
    batch: object
    z: object
    y: object
    x: object
    head: object


class Terms(NamedTuple):
    """What the score l2 adds for every query and every key (``distances.py``)."""

    of_queries: object
    of_keys: object


class Operand(NamedTuple):
    """Rows at some places: their addresses, which of them exist, and their chunks (none where streamed)."""

    pointers: object
    valid: object
    held: object


@triton.constexpr_function
def wide(chunks):
    """Whether the double backward has no registers left to hold what is invariant over a walk (``disable_licm``)."""
    return sum(chunks) > 64


@triton.constexpr_function
def two_fit(chunks):
    """Whether the registers hold two sums of rows over a walk."""
    return sum(chunks) <= 128


@triton.constexpr_function
def _width(chunks, index):
    return chunks[index]


@triton.constexpr_function
def _first(chunks, index):
    return sum(chunks[:index])


@triton.jit
def zeros(HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    return tl.zeros((HEIGHT, WIDTH), TYPE)


@triton.jit
def zero_rows(HEIGHT: tl.constexpr, S: tl.constexpr):
    """Accumulators of one row of channels per position."""
    rows = ()
    for index in tl.static_range(len(S.chunks)):
        rows = rows + (zeros(HEIGHT, _width(S.chunks, index), S.accumulate),)
    return rows


@triton.jit
def number(bits, S: tl.constexpr):
    """A float64 kernel argument that came as its bits (Triton passes floats in single precision)."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(S.accumulate)


@triton.jit
def round_to(x, TYPE: tl.constexpr, S: tl.constexpr):
    """Cast, to nearest even (which the interpreter does not do for bfloat16)."""
    if S.interpreted and tl.bfloat16 == TYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x.to(tl.float32))
    return x.to(TYPE)


@triton.jit
def dot(a, b, total, S: tl.constexpr):
    """total + a @ b. The interpreter has no products of bfloat16."""
    if S.interpreted:
        a = a.to(S.accumulate)
        b = b.to(S.accumulate)
    return tl.dot(a, b, total, input_precision=S.precision, out_dtype=S.accumulate)


@triton.jit
def multiply_add(x, factor, total, S: tl.constexpr):
    """x * factor + total with a number as factor, rounded once and to nearest.

    Not toward zero, which would not overflow: a large total would then differ from the same total less a little.
    """
    return tl.fma(x, factor + tl.zeros((1, 1), S.accumulate), total)


@triton.jit
def row_pointers(rows, lattice, place, KEYS: tl.constexpr, S: tl.constexpr):
    """Address of the first channel at every place; offsets are 64 bits wide. With KEYS heads are those of keys."""
    head = lattice.head
    if KEYS and S.shared > 1:
        head = head // S.shared
    image = lattice.batch.to(tl.int64) * rows.batch + head.to(tl.int64) * rows.head
    y = pixel_of(place.y, lattice.y).to(tl.int64)
    x = pixel_of(place.x, lattice.x).to(tl.int64)
    pixel = y * rows.y + x * rows.x
    if S.deep:
        pixel += pixel_of(place.z, lattice.z).to(tl.int64) * rows.z
    return rows.pointer + image * S.align + pixel * S.align


@triton.jit
def _load(pointers, valid, first, WIDTH: tl.constexpr, WHOLE: tl.constexpr, S: tl.constexpr):
    channel = first + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if not WHOLE:
        mask = mask & (channel < S.head_dim)[None, :]
    return tl.load(pointers[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.constexpr_function
def _whole(chunks, index, head_dim):
    return sum(chunks[: index + 1]) <= head_dim


@triton.jit
def load_chunk(pointers, valid, INDEX: tl.constexpr, S: tl.constexpr):
    whole: tl.constexpr = _whole(S.chunks, INDEX, S.head_dim)
    return _load(pointers, valid, _first(S.chunks, INDEX), _width(S.chunks, INDEX), whole, S)


@triton.jit
def load_rows(rows, lattice, place, KEYS: tl.constexpr, S: tl.constexpr):
    """Those of a tensor of queries or, with KEYS, of keys at some places of a lattice; None of None."""
    if rows is None:
        return
    else:
        pointers = row_pointers(rows, lattice, place, KEYS, S)
        held = ()
        if not S.streamed:
            for index in tl.static_range(len(S.chunks)):
                held = held + (load_chunk(pointers, place.valid, index, S),)
        return Operand(pointers, place.valid, held)


@triton.jit
def chunk_of(operand, INDEX: tl.constexpr, S: tl.constexpr):
    if S.streamed:
        return load_chunk(operand.pointers, operand.valid, INDEX, S)
    else:
        return operand.held[INDEX]


@triton.jit
def add_product(total, a, b, S: tl.constexpr):
    """total + a @ b^T, summed over the channels."""
    if S.streamed:
        WIDTH: tl.constexpr = _width(S.chunks, 0)  # of every chunk
        for first in range(0, len(S.chunks) * WIDTH, WIDTH):
            left = _load(a.pointers, a.valid, first, WIDTH, False, S)
            right = _load(b.pointers, b.valid, first, WIDTH, False, S)
            total = dot(left, tl.trans(right), total, S)
    else:
        for index in tl.static_range(len(S.chunks)):
            total = dot(a.held[index], tl.trans(b.held[index]), total, S)
    return total


@triton.jit
def product(a, b, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr):
    """a @ b^T, summed over the channels."""
    return add_product(zeros(HEIGHT, WIDTH, S.accumulate), a, b, S)


@triton.jit
def rounded(weights, operand, S: tl.constexpr):
    """Weights as ``add_weighted`` multiplies them: in the operand's dtype."""
    return round_to(weights, operand.pointers.dtype.element_ty, S)


@triton.jit
def zero_totals(HEIGHT: tl.constexpr, S: tl.constexpr):
    """Accumulators of one number per row, for ``add_totals``."""
    return zeros(HEIGHT, TOTALS, S.accumulate)


@triton.jit
def add_totals(totals, weights, S: tl.constexpr):
    """totals + the sums of rounded weights along axis 1, in every column.

    As a product with ones: it adds up what the matrix unit makes of the weights, in fewer instructions than a sum.
    """
    ones = tl.full((S.block, TOTALS), 1.0, S.accumulate)
    return dot(weights, ones.to(weights.dtype), totals, S)


@triton.jit
def totals_of(totals):
    """A column; those of the totals are alike."""
    return tl.max(totals, 1, keep_dims=True)


@triton.jit
def add_weighted(rows, weights, operand, S: tl.constexpr):
    """rows + weights @ operand, for every chunk of channels."""
    weights = rounded(weights, operand, S)
    total = ()
    for index in tl.static_range(len(S.chunks)):
        total = total + (dot(weights, chunk_of(operand, index, S), rows[index], S),)
    return total


@triton.jit
def row_sums(a, b, HEIGHT: tl.constexpr, S: tl.constexpr):
    """Sum over the channels of a * b, as a column."""
    total = zeros(HEIGHT, 1, S.accumulate)
    for index in tl.static_range(len(S.chunks)):
        total += tl.sum(
            chunk_of(a, index, S).to(S.accumulate) * chunk_of(b, index, S).to(S.accumulate), 1, keep_dims=True
        )
    return total


@triton.jit
def row_products(a, b, HEIGHT: tl.constexpr, S: tl.constexpr):
    """Sum over the channels of a * b, as a column, with the roundings of ``product``."""
    index = tl.arange(0, HEIGHT)
    pairs = product(a, b, HEIGHT, HEIGHT, S)
    return tl.sum(tl.where(index[:, None] == index[None, :], pairs, 0.0), 1, keep_dims=True)


@triton.jit
def store_rows(rows, lattice, place, KEYS: tl.constexpr, values, S: tl.constexpr):
    pointers = row_pointers(rows, lattice, place, KEYS, S)
    for index in tl.static_range(len(S.chunks)):
        channel = _first(S.chunks, index) + tl.arange(0, _width(S.chunks, index))
        mask = place.valid[:, None]
        if not _whole(S.chunks, index, S.head_dim):
            mask = mask & (channel < S.head_dim)[None, :]
        value = round_to(values[index], rows.pointer.dtype.element_ty, S)
        tl.store(pointers[:, None] + channel[None, :], value, mask=mask)


@triton.jit
def row_index(lattice, place, KEYS: tl.constexpr, S: tl.constexpr):
    """Index of every place's number among those of the lattice's image and head, of queries or, with KEYS, of keys."""
    row = pixel_of(place.y, lattice.y)
    if S.deep:
        row += pixel_of(place.z, lattice.z) * lattice.height
    return row * (lattice.keys_width if KEYS else lattice.width) + pixel_of(place.x, lattice.x)


@triton.jit
def load_column(numbers, lattice, place, S: tl.constexpr):
    """Numbers of queries, as a column; zero for those that do not exist."""
    return tl.load(numbers + lattice.first_query + row_index(lattice, place, False, S), mask=place.valid, other=0.0)[
        :, None
    ]


@triton.jit
def store_column(numbers, lattice, place, column, KEYS: tl.constexpr, S: tl.constexpr):
    first = lattice.first_key if KEYS else lattice.first_query
    tl.store(numbers + first + row_index(lattice, place, KEYS, S)[:, None], column, mask=place.valid[:, None])


@triton.jit
def scaled(rows, factor, S: tl.constexpr):
    """rows * factor; ``factor`` is a number or a column."""
    results = ()
    for index in tl.static_range(len(S.chunks)):
        results = results + (rows[index] * factor,)
    return results


@triton.jit
def subtract_scaled(rows, factor, operand, S: tl.constexpr):
    """rows - factor * operand; ``factor`` is a column."""
    results = ()
    for index in tl.static_range(len(S.chunks)):
        chunk = chunk_of(operand, index, S).to(S.accumulate)
        results = results + (rows[index] - factor * chunk,)
    return results


@triton.jit
def subtract_multiples(rows, factor, others, S: tl.constexpr):
    """rows - factor * others, of results of ``add_weighted``; ``factor`` is a column."""
    results = ()
    for index in tl.static_range(len(S.chunks)):
        results = results + (rows[index] - factor * others[index],)
    return results


@triton.jit
def store_about_own_keys(grad_query, lattice, tile, dq, sums, key, scale, S: tl.constexpr):
    """dQ, scaled, about the key at each query's own place: ``sums`` are the rows' of score gradients, which should be
    zero, so that what is left of them counts differences of keys only."""
    near = load_rows(key, lattice, own_keys(tile, lattice), True, S)
    store_rows(grad_query, lattice, tile, False, scaled(subtract_scaled(dq, sums, near, S), scale, S), S)
