"""What the host decides before a launch: how the lattice of a problem is cut into tiles. See docs/triton.md.

Every neighborhood is a set of lattices (the residue classes of a dilated neighborhood, the windows of a grid, the
one line of tokens of full attention) in which a query at position p sees the keys ``start(p) ... start(p) + window -
1`` of each axis. A program owns a tile of queries (or of keys) and walks over blocks of the other side.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...geometry import FULL, GRID, NEIGHBORHOOD

IntPair = tuple[int, int]
QUERY, KEY = "query", "key"
SMALL_WINDOW = 32


@dataclass(frozen=True)
class Axis:
    """One axis of equal lattices: how many queries and keys they hold, and how wide the window is."""

    kind: int
    queries: int
    keys: int
    window: int

    def keys_of(self, first: int, last: int) -> IntPair:
        """Range of keys that the queries ``first ... last`` see."""
        return self._start(first), self._start(last) + self.window

    def queries_of(self, first: int, last: int) -> IntPair:
        """Range of queries that see any of the keys ``first ... last``."""
        if self.kind == FULL:
            return 0, self.queries
        if self.kind == GRID:
            return first // self.window * self.window, (last // self.window + 1) * self.window
        half = self.window // 2
        low = 0 if first < self.window else first - self.window + 1 + half
        return low, self.queries if last >= self.queries - self.window else last + half + 1

    def _start(self, query: int) -> int:
        if self.kind == FULL:
            return 0
        if self.kind == GRID:
            return query // self.window * self.window
        return min(max(query - self.window // 2, 0), self.queries - self.window)

    def blocks(self, own: int, block: int, owner: str) -> int:
        """Blocks that all tiles of ``own`` queries (or keys) of one lattice walk over, on this axis."""
        length = self.queries if owner == QUERY else self.keys
        reach = self.keys_of if owner == QUERY else self.queries_of
        total = 0
        for first in range(0, length, own):
            low, high = reach(first, min(first + own, length) - 1)
            total += -(-(high - low) // block)
        return total


@dataclass(frozen=True)
class Problem:
    """Shapes and neighborhood of a launch. ``members`` holds (kernel, kernel, dilation, dilation) of every head."""

    kind: int
    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    window: IntPair
    members: tuple[tuple[int, int, int, int], ...]

    @property
    def queries(self) -> int:
        return self.height * self.width

    @property
    def keys(self) -> int:
        return self.window[1] if self.kind == FULL else self.queries

    @property
    def shape_class(self) -> str:
        """What tile sizes are chosen for: "full", "grid", "windows" (small ones) or "neighborhood"."""
        if self.kind == GRID:
            return "grid" if self.window[0] * self.window[1] >= SMALL_WINDOW else "windows"
        return "full" if self.kind == FULL else "neighborhood"

    def lattices(self, packed: bool) -> Iterator[tuple[int, Axis, Axis]]:
        """(how many, vertical axis, horizontal axis) of the lattices of all heads of one image."""
        if self.kind != NEIGHBORHOOD:
            counts, axes = zip(*(self._dense(i, packed) for i in (0, 1)), strict=True)
            yield self.heads * counts[0] * counts[1], *axes
            return
        for member in dict.fromkeys(self.members):
            share = self.members.count(member)
            for rows, vertical in self._classes(self.height, member[0], member[2]):
                for columns, horizontal in self._classes(self.width, member[1], member[3]):
                    yield share * rows * columns, vertical, horizontal

    def _dense(self, axis: int, packed: bool) -> tuple[int, Axis]:
        size, window = (self.height, self.width)[axis], self.window[axis]
        if self.kind == FULL:
            return 1, Axis(FULL, size, window, window)
        if packed:
            return 1, Axis(GRID, size, size, window)
        return size // window, Axis(GRID, window, window, window)

    @staticmethod
    def _classes(size: int, window: int, dilation: int) -> list[tuple[int, Axis]]:
        """Residue classes of one axis: there are at most two lengths."""
        longer = size % dilation
        lengths = [(longer, size // dilation + 1), (dilation - longer, size // dilation)]
        return [(n, Axis(NEIGHBORHOOD, length, length, window)) for n, length in lengths if n]

    def longest(self, packed: bool, owner: str) -> list[IntPair]:
        """(height, width) of the largest lattice of every head (one entry where all heads are alike)."""
        if self.kind == FULL:
            return [(1, self.width if owner == QUERY else self.keys)]
        if self.kind == GRID:
            return [(self.height, self.width) if packed else self.window]
        return [(-(-self.height // m[2]), -(-self.width // m[3])) for m in self.members]

    def axes(self, head: int, packed: bool) -> tuple[list[Axis], list[Axis]]:
        """The different vertical and horizontal axes of a head's lattices."""
        if self.kind != NEIGHBORHOOD:
            return [self._dense(0, packed)[1]], [self._dense(1, packed)[1]]
        member = self.members[head]
        rows, columns = (
            self._classes(size, member[i], member[2 + i]) for i, size in enumerate((self.height, self.width))
        )
        return [axis for _, axis in rows], [axis for _, axis in columns]

    def instances(self, packed: bool) -> list[int]:
        """Lattices of every head (one entry where all heads are alike)."""
        if self.kind == NEIGHBORHOOD:
            return [m[2] * m[3] for m in self.members]
        if self.kind == GRID and not packed:
            return [(self.height // self.window[0]) * (self.width // self.window[1])]
        return [1]

    def fits(self, tiles: Tiling, owner: str) -> bool:
        """Whether lattices are divided into whole tiles and blocks, and tiles into whole blocks."""
        owned, other = (self.longest(tiles.packed, side)[0] for side in (owner, KEY if owner == QUERY else QUERY))
        sizes = zip(owned, other, tiles.own, tiles.block, strict=True)
        return all(a % own == b % block == own % block == 0 for a, b, own, block in sizes)

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, over all heads of one image."""
        if self.kind == NEIGHBORHOOD:
            return self.queries * sum(m[0] * m[1] for m in self.members)
        return self.queries * self.heads * self.window[0] * self.window[1]


@dataclass(frozen=True)
class Tiling:
    """Extents of a program's own tile and of the blocks that it walks over, in positions of the lattice."""

    own: IntPair
    block: IntPair
    packed: bool
    """Whether the windows of a grid share one lattice (the map), so that a tile may hold several."""
    tiles: int
    """Programs per head and image."""
    blocks: int
    """Blocks walked over by all programs of one image."""

    @property
    def issued(self) -> int:
        """Pairs of a query and a key that the programs of one image compute, masked ones included."""
        return self.blocks * self.own[0] * self.own[1] * self.block[0] * self.block[1]


def problem_of(code: Sequence[int], query: torch.Tensor, key: torch.Tensor) -> Problem:
    return _problem_of(tuple(code), tuple(query.shape), key.shape[1])


@functools.lru_cache(maxsize=4096)
def _problem_of(code: tuple[int, ...], shape: tuple[int, ...], keys: int) -> Problem:
    kind = code[0]
    batch, *tokens, heads, head_dim = shape
    height, width = tokens if len(tokens) == 2 else (1, *tokens)
    members: tuple = ()
    if kind == FULL:
        window = 1, keys
    elif kind == GRID:
        window = code[-2], code[-1]
    else:
        heads_windows = [[code[i : i + 4] for i in (head + 4, head + 8)] for head in range(1, len(code), 12)]
        members = tuple((y[0], x[0], y[1], x[1]) for y, x in heads_windows)
        window = max(m[0] for m in members), max(m[1] for m in members)
    return Problem(kind, batch, height, width, heads, head_dim, window, members)


@functools.lru_cache(maxsize=4096)
def tiling(problem: Problem, own: int, block: int, owner: str) -> Tiling:
    """The way to shape tiles of ``own`` and blocks of ``block`` positions that computes the fewest pairs.

    Both are powers of two. A tile is never larger than the largest lattice needs (but has at least 16 positions).
    Small windows share a lattice, so that a tile has several of them.
    """
    best = None
    for packed in {"grid": (False, True), "windows": (True,)}.get(problem.shape_class, (False,)):
        longest = problem.longest(packed, owner)
        need = max(_power(h) * _power(w) for h, w in longest)
        lattices = list(problem.lattices(packed))
        for own_extents in _splits(min(own, max(need, 16)), max(h for h, _ in longest)):
            for block_extents in _splits(block, problem.height):
                count = sum(
                    n
                    * y.blocks(own_extents[0], block_extents[0], owner)
                    * x.blocks(own_extents[1], block_extents[1], owner)
                    for n, y, x in lattices
                )
                # Equal work: square tiles share more keys in the cache, and fewer shapes are compiled.
                rank = count * own_extents[0] * own_extents[1], _length(own_extents), _length(block_extents)
                if best is None or rank < best[0]:
                    tiles = max(
                        instances * -(-h // own_extents[0]) * -(-w // own_extents[1])
                        for instances, (h, w) in zip(problem.instances(packed), longest, strict=True)
                    )
                    best = rank, Tiling(own_extents, block_extents, packed, tiles, count)
    assert best is not None
    return best[1]


def _splits(size: int, height: int) -> Iterator[IntPair]:
    """All (rows, columns) of powers of two that hold ``size`` positions, with no more rows than the height needs."""
    rows = 1
    while rows <= size and rows <= _power(height):
        yield rows, size // rows
        rows *= 2


def _length(extents: IntPair) -> tuple[int, int]:
    """How far from square an area of given size is; of equal ones, the wide comes first."""
    return abs(extents[0].bit_length() - extents[1].bit_length()), extents[0]


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
    vertical: Displaced
    horizontal: Displaced
    lattices: int

    @property
    def visits(self) -> int:
        """Tiles of one image."""
        return self.lattices * self.vertical.tiles * self.horizontal.tiles


@functools.lru_cache(maxsize=4096)
def displacements(problem: Problem, tiles: Tiling) -> tuple[Displacement, ...]:
    """Where blocks of keys lie relative to tiles of queries: together they hold every pair, and each pair once."""
    results: list[Displacement] = []
    instances = problem.instances(tiles.packed)
    for head in range(problem.heads):
        places = [
            _displaced(axes, own, block)
            for axes, own, block in zip(problem.axes(head, tiles.packed), tiles.own, tiles.block, strict=True)
        ]
        lattices = instances[head if len(instances) > 1 else 0]
        results += [Displacement(head, *pair, lattices) for pair in itertools.product(*places)]
    return tuple(results)


def _displaced(axes: Sequence[Axis], own: int, block: int) -> list[Displaced]:
    """All blocks that tiles of the axes see keys of, aligned so that they are as few as possible."""
    reaches: dict[IntPair, list[int]] = {}  # relative to the tile: which tiles
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
    return visits * tiles.own[0] * tiles.own[1] * tiles.block[0] * tiles.block[1]


def offset_extent(own: int, block: int) -> int:
    """Power of two that holds the offsets between the positions of a tile and of a block, on one axis."""
    return 1 << (own + block - 2).bit_length()  # calls nothing: kernels use it too
