"""What the host decides before a launch: how the lattice of a problem is cut into tiles. See docs/triton.md.

Every neighborhood is a set of lattices (the residue classes of a dilated neighborhood, the windows of a grid, the
one line of tokens of full attention) in which a query sees a range of keys on each axis; both ends of the range grow
with the query. A program owns a tile of queries (or of keys) and walks over blocks of the other side.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...geometry import FULL, GRID, MAP_AXES, NEIGHBORHOOD, AxisWindow, Extents, HeadWindow, decode

QUERY, KEY = "query", "key"
SMALL_WINDOW = 32

Range = tuple[int, int]
"""From the first to before the last."""


@dataclass(frozen=True)
class Axis:
    """One axis of equal lattices: how many queries and keys they hold, and which keys a query sees."""

    kind: int
    queries: int
    keys: int
    window: int
    stride: int = 1
    causal: bool = False

    def keys_of(self, first: int, last: int) -> Range:
        """Keys that the queries ``first ... last`` see."""
        return self._start(first), last + 1 if self.causal else self._start(last) + self.window

    def queries_of(self, first: int, last: int) -> Range:
        """Queries that see any of the keys ``first ... last``."""
        if self.kind == FULL:
            return 0, self.queries
        if self.kind == GRID:
            return first // self.window * self.window, (last // self.window + 1) * self.window
        stride, shift = self.stride, self._shift
        low = 0 if first < self.window else -(-(first - self.window + 1 - shift) // stride) * stride
        # Not beyond the last query, for a stride is at most the window.
        high = self.queries if last >= self.queries - self.window else ((last - shift) // stride + 1) * stride
        return first if self.causal else low, high

    @property
    def _shift(self) -> int:
        """Where the window of a stride group starts from the first query of the group, if no border is near."""
        return self.stride - self.window if self.causal else self.stride // 2 - self.window // 2

    def _start(self, query: int) -> int:
        if self.kind == FULL:
            return 0
        if self.kind == GRID:
            return query // self.window * self.window
        return min(max(query - query % self.stride + self._shift, 0), self.queries - self.window)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        if not self.causal:
            return self.queries * self.window
        return sum(query + 1 - self._start(query) for query in range(self.queries))


@functools.lru_cache(maxsize=1 << 14)
def _blocks(axis: Axis, own: int, block: int, owner: str) -> int:
    """Blocks that all tiles of ``own`` queries (or keys) of one lattice walk over, on one axis."""
    length = axis.queries if owner == QUERY else axis.keys
    reach = axis.keys_of if owner == QUERY else axis.queries_of
    total = 0
    for first in range(0, length, own):
        low, high = reach(first, min(first + own, length) - 1)
        total += -(-(high - low) // block)
    return total


@dataclass(frozen=True)
class Problem:
    """Shapes and neighborhood of a launch; extents are those of three axes, ``windows`` are per head."""

    kind: int
    batch: int
    extents: Extents
    heads: int
    head_dim: int
    window: Extents
    windows: tuple[HeadWindow, ...]
    shared: int = 1
    """Heads to a key head: adjacent ones with one window."""

    @property
    def key_heads(self) -> int:
        return self.heads // self.shared

    @property
    def queries(self) -> int:
        return math.prod(self.extents)

    @property
    def keys(self) -> int:
        return self.window[-1] if self.kind == FULL else self.queries

    @property
    def deep(self) -> bool:
        """Whether the map has a third axis."""
        return self.extents[0] > 1

    @property
    def shape_class(self) -> str:
        """What tile sizes are chosen for: "full", "grid", "windows" (small ones) or "neighborhood"."""
        if self.kind == GRID:
            return "grid" if math.prod(self.window) >= SMALL_WINDOW else "windows"
        return "full" if self.kind == FULL else "neighborhood"

    @functools.cached_property
    def strided(self) -> tuple[bool, ...]:
        """On which axes some head has a stride."""
        return tuple(any(head[axis].stride > 1 for head in self.windows) for axis in range(MAP_AXES))

    @functools.cached_property
    def causal(self) -> tuple[bool, ...]:
        """On which axes some head has causal windows."""
        return tuple(any(head[axis].causal for head in self.windows) for axis in range(MAP_AXES))

    def lattices(self, packed: bool) -> Iterator[tuple[int, tuple[Axis, ...]]]:
        """(how many, their axes) of the lattices of all heads of one image."""
        if self.kind != NEIGHBORHOOD:
            counts, axes = zip(*(self._dense(axis, packed) for axis in range(MAP_AXES)), strict=True)
            yield self.heads * math.prod(counts), axes
            return
        for head, heads in Counter(self.windows).items():
            for classes in itertools.product(*map(_classes, self.extents, head)):
                counts, axes = zip(*classes, strict=True)
                yield heads * math.prod(counts), axes

    def _dense(self, axis: int, packed: bool) -> tuple[int, Axis]:
        size, window = self.extents[axis], self.window[axis]
        if self.kind == FULL:
            return 1, Axis(FULL, size, window, window)
        if packed:
            return 1, Axis(GRID, size, size, window)
        return size // window, Axis(GRID, window, window, window)

    def longest(self, packed: bool, owner: str) -> list[Extents]:
        """Extents of the largest lattice of every head (one entry where all heads are alike)."""
        if self.kind == FULL:
            return [self.extents if owner == QUERY else self.window]
        if self.kind == GRID:
            return [self.extents if packed else self.window]
        return [
            tuple(-(-size // axis.dilation) for size, axis in zip(self.extents, head, strict=True))
            for head in self.windows
        ]

    def axes(self, head: int, packed: bool) -> list[list[Axis]]:
        """The different axes of a head's lattices, for each axis of the map."""
        if self.kind != NEIGHBORHOOD:
            return [[self._dense(axis, packed)[1]] for axis in range(MAP_AXES)]
        return [[axis for _, axis in classes] for classes in map(_classes, self.extents, self.windows[head])]

    def instances(self, packed: bool) -> list[int]:
        """Lattices of every head (one entry where all heads are alike)."""
        if self.kind == NEIGHBORHOOD:
            return [math.prod(axis.dilation for axis in head) for head in self.windows]
        return [math.prod(self._dense(axis, packed)[0] for axis in range(MAP_AXES))]

    def tiles(self, own: Extents, packed: bool, owner: str) -> int:
        """Tiles of all lattices of one image and head, of the head that has most."""
        return max(
            instances * math.prod(-(-size // extent) for size, extent in zip(sizes, own, strict=True))
            for instances, sizes in zip(self.instances(packed), self.longest(packed, owner), strict=True)
        )

    def fits(self, tiles: Tiling, owner: str) -> bool:
        """Whether lattices are divided into whole tiles and blocks, and tiles into whole blocks."""
        owned, other = (self.longest(tiles.packed, side)[0] for side in (owner, KEY if owner == QUERY else QUERY))
        sizes = zip(owned, other, tiles.own, tiles.block, strict=True)
        return all(a % own == b % block == own % block == 0 for a, b, own, block in sizes)

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, over all heads of one image."""
        return sum(count * math.prod(axis.pairs for axis in axes) for count, axes in self.lattices(False))


def _classes(size: int, window: AxisWindow) -> list[tuple[int, Axis]]:
    """(how many, axis) of the residue classes of one axis: there are at most two lengths."""
    kernel, dilation, stride, causal = window
    longer = size % dilation
    lengths = [(longer, size // dilation + 1), (dilation - longer, size // dilation)]
    return [(n, Axis(NEIGHBORHOOD, length, length, kernel, stride, causal)) for n, length in lengths if n]


@dataclass(frozen=True)
class Tiling:
    """Extents of a program's own tile and of the blocks that it walks over, in positions of the lattice."""

    own: Extents
    block: Extents
    packed: bool
    """Whether the windows of a grid share one lattice (the map), so that a tile may hold several."""
    tiles: int
    """Programs per head and image."""
    blocks: int
    """Blocks walked over by all programs of one image."""

    @property
    def issued(self) -> int:
        """Pairs of a query and a key that the programs of one image compute, masked ones included."""
        return self.blocks * math.prod(self.own) * math.prod(self.block)


def problem_of(code: Sequence[int], query: torch.Tensor, key: torch.Tensor) -> Problem:
    return _problem_of(tuple(code), tuple(query.shape), key.shape[1], query.shape[-2] // key.shape[-2])


@functools.lru_cache(maxsize=4096)
def _problem_of(code: tuple[int, ...], shape: tuple[int, ...], keys: int, shared: int = 1) -> Problem:
    kind = code[0]
    batch, *tokens, heads, head_dim = shape
    extents = *(1,) * (MAP_AXES - len(tokens)), *tokens
    neighborhood = decode(code, MAP_AXES)
    window = (1, 1, keys) if kind == FULL else neighborhood.kernel
    windows = neighborhood.windows if kind == NEIGHBORHOOD else ()
    return Problem(kind, batch, extents, heads, head_dim, window, windows, shared)


@functools.lru_cache(maxsize=4096)
def tiling(problem: Problem, own: int, block: int, owner: str) -> Tiling:
    """The way to shape tiles of ``own`` and blocks of ``block`` positions that computes the fewest pairs.

    Both are powers of two. A tile is never larger than the largest lattice needs (but has at least 16 positions).
    Small windows share a lattice, so that a tile has several of them.
    """
    best = None
    owners = (owner,) * MAP_AXES
    for packed in {"grid": (False, True), "windows": (True,)}.get(problem.shape_class, (False,)):
        longest = problem.longest(packed, owner)
        need = max(math.prod(map(_power, extents)) for extents in longest)
        lattices = list(problem.lattices(packed))
        for own_extents in _splits(min(own, max(need, 16)), tuple(map(max, zip(*longest, strict=True)))):
            for block_extents in _splits(block, problem.extents):
                count = sum(
                    n * math.prod(map(_blocks, axes, own_extents, block_extents, owners)) for n, axes in lattices
                )
                # Equal work: square tiles share more keys in the cache, and fewer shapes are compiled.
                lengths = _length(own_extents, problem.deep), _length(block_extents, problem.deep)
                rank = count * math.prod(own_extents), *lengths
                if best is None or rank < best[0]:
                    tiles = problem.tiles(own_extents, packed, owner)
                    best = rank, Tiling(own_extents, block_extents, packed, tiles, count)
    assert best is not None
    return best[1]


def _splits(size: int, extents: Extents) -> Iterator[Extents]:
    """All (planes, rows, columns) of powers of two that hold ``size`` positions, with no more planes and rows than the
    extents need."""
    for planes in _powers(min(size, _power(extents[0]))):
        for rows in _powers(min(size // planes, _power(extents[1]))):
            yield planes, rows, size // planes // rows


def _length(extents: Extents, deep: bool) -> tuple[int, ...]:
    """How far from square an area of given size is, or a volume from a cube; of equal ones, the wide comes first."""
    bits = [extent.bit_length() for extent in (extents if deep else extents[1:])]
    return max(bits) - min(bits), *extents


def _powers(most: int) -> list[int]:
    """Powers of two up to one of them."""
    return [1 << i for i in range(most.bit_length())]


def _power(number: int) -> int:
    """Smallest power of two that is not below the number."""
    return 1 << max(number - 1, 0).bit_length()


class Displaced(NamedTuple):
    """Blocks at one place relative to their tiles, on one axis."""

    start: int
    """First position of a block from the first of its tile."""
    first: int
    """First tile that sees keys of such a block."""
    tiles: int
    """How many tiles from there on may see some."""


class Displacement(NamedTuple):
    """Blocks of keys at one place relative to tiles of queries, for one head."""

    head: int
    axes: tuple[Displaced, ...]
    lattices: int

    @property
    def visits(self) -> int:
        """Tiles of one image."""
        return self.lattices * math.prod(axis.tiles for axis in self.axes)


@functools.lru_cache(maxsize=4096)
def displacements(problem: Problem, tiles: Tiling) -> tuple[Displacement, ...]:
    """Where blocks of keys lie relative to tiles of queries: together they hold every pair, and each pair once."""
    results: list[Displacement] = []
    instances = problem.instances(tiles.packed)
    for head in range(problem.heads):
        places = map(_displaced, problem.axes(head, tiles.packed), tiles.own, tiles.block)
        lattices = instances[head if len(instances) > 1 else 0]
        results += [Displacement(head, axes, lattices) for axes in itertools.product(*places)]
    return tuple(results)


def _displaced(axes: Sequence[Axis], own: int, block: int) -> list[Displaced]:
    """All blocks that tiles of the axes see keys of, aligned so that they are as few as possible."""
    reaches: dict[Range, list[int]] = {}  # relative to the tile: which tiles
    for axis in axes:
        for tile, first in enumerate(range(0, axis.queries, own)):
            low, high = axis.keys_of(first, min(first + own, axis.queries) - 1)
            reaches.setdefault((low - first, high - first), []).append(tile)

    def seen(shift: int) -> dict[int, list[int]]:
        blocks: dict[int, list[int]] = {}
        for (low, high), seeing in reaches.items():
            for index in range((low - shift) // block, (high - 1 - shift) // block + 1):
                blocks.setdefault(shift + index * block, []).extend(seeing)
        return blocks

    fewest = min((seen(shift) for shift in range(block)), key=lambda blocks: sum(map(len, blocks.values())))
    return [Displaced(start, min(seeing), max(seeing) - min(seeing) + 1) for start, seeing in sorted(fewest.items())]


def displaced_pairs(problem: Problem, tiles: Tiling) -> int:
    """Pairs of a query and a key that the gradient of the table computes for one image, masked ones included."""
    visits = sum(displacement.visits for displacement in displacements(problem, tiles))
    return visits * math.prod(tiles.own) * math.prod(tiles.block)


def offset_extent(own: int, block: int) -> int:
    """Power of two that holds the offsets between the positions of a tile and of a block, on one axis."""
    return 1 << (own + block - 2).bit_length()  # calls nothing: kernels use it too
