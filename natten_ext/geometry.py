"""Which keys a query attends: the one Python definition of every neighborhood.

The C++ twin is ``csrc/geometry.h``; ``tests/operators/test_geometry.py`` holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from .remembered import remembered

Extents = tuple[int, ...]
"""Of a map, a window or a kernel, one per map axis: (width,), (height, width) or (depth, height, width)."""

# Leading code of the integer list that describes a neighborhood to the operators (csrc/problem.h).
FULL, GRID, NEIGHBORHOOD = 0, 1, 2

MAP_AXES = 3
"""How many axes the code has; a map of fewer has an extent of 1 on the first ones."""


class AxisWindow(NamedTuple):
    """Which keys a query sees on one axis: keys of its residue class modulo the dilation, in a row.

    Positions are counted inside the class. Queries fall into groups of ``stride``; all of a group have the window of
    its leader, which is the middle query (of an even number the right one of two), or the last one where windows are
    causal. A window has ``kernel`` keys about the leader, of an even number one more on the left, and is shifted inward
    at the borders, never padded. A causal one has the ``kernel`` keys that end with the leader, less those before the
    first position and those after the query itself.

    NATTEN's rule (Hassani et al., arXiv 2204.07143; dilation: 2209.15001; stride: "Generalized Neighborhood Attention",
    2504.16922).
    """

    kernel: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False

    def keys(self, index: int, length: int) -> range:
        """The keys that the query at ``index`` sees, on an axis of this length."""
        residue, position = index % self.dilation, index // self.dilation
        class_length = (length - residue + self.dilation - 1) // self.dilation
        group = position // self.stride * self.stride
        if self.causal:
            leader = min(group + self.stride - 1, class_length - 1)
            start, end = max(leader - self.kernel + 1, 0), position + 1
        else:
            leader = min(group + self.stride // 2, class_length - 1)
            start = min(max(leader - self.kernel // 2, 0), class_length - self.kernel)
            end = start + self.kernel
        return range(residue + start * self.dilation, residue + end * self.dilation, self.dilation)

    @property
    def sliding(self) -> bool:
        """Whether it moves with every query and has as many keys everywhere."""
        return self.stride == 1 and not self.causal


HeadWindow = tuple[AxisWindow, ...]
"""Of one head, one per map axis."""


@dataclass(frozen=True)
class Full:
    """Every query attends every key."""

    kind: ClassVar[str] = "full"
    general: ClassVar[bool] = False

    def keys(self, tokens: int) -> int:
        """The most keys that a query attends, of ``tokens``."""
        return tokens

    def sharing(self, heads: int) -> int:
        """How many heads may share a key head, where so many are to: adjacent ones that have one window."""
        return heads

    def encode(self) -> tuple[int, ...]:
        return (FULL,)


@dataclass(frozen=True)
class Grid:
    """Every query attends the keys of the non-overlapping ``window`` that holds it.

    Windows begin at ``shift`` (empty: at zero) and every ``window`` from there; those at the map's borders are cut off.
    """

    window: Extents
    shift: Extents = ()
    kind: ClassVar[str] = "grid"

    @property
    def kernel(self) -> Extents:
        """Extent that sizes the relative position table."""
        return self.window

    @property
    def general(self) -> bool:
        """As of ``Neighborhood``."""
        return len(self.window) > 2

    def keys(self, tokens: int) -> int:
        """The most keys that a query attends, of ``tokens``."""
        return math.prod(self.window)

    def sharing(self, heads: int) -> int:
        """As of ``Full``."""
        return heads

    @property
    def first(self) -> Extents:
        """Where whole windows begin, on each axis."""
        return self.shift or (0,) * len(self.window)

    def cut(self, extents: Sequence[int]) -> bool:
        """Whether the borders of a map of these extents cut windows off."""
        return any(self.shift) or any(size % window for size, window in zip(extents, self.window, strict=True))

    @remembered
    def encode(self) -> tuple[int, ...]:
        """Of whole windows, which operators take."""
        return GRID, *(1,) * (MAP_AXES - len(self.window)), *self.window


@dataclass(frozen=True)
class Neighborhood:
    """Sliding windows, of their own for each head."""

    windows: tuple[HeadWindow, ...]
    kind: ClassVar[str] = "neighborhood"

    @property
    @remembered
    def kernel(self) -> Extents:
        """Largest kernel over the heads: the extent that sizes the relative position table."""
        return tuple(max(window.kernel for window in axis) for axis in zip(*set(self.windows), strict=True))

    @property
    @remembered
    def general(self) -> bool:
        """Whether it has more than windows that slide on two map axes: a third axis, a stride or causal windows."""
        return any(len(head) > 2 or not all(window.sliding for window in head) for head in set(self.windows))

    @remembered
    def encode(self) -> tuple[int, ...]:
        code = [NEIGHBORHOOD]
        for first, last in self.head_groups():
            head = self.windows[first]
            axes = (*(AxisWindow(1),) * (MAP_AXES - len(head)), *head)
            code += [int(number) for window in axes for number in window] * (last - first)
        return tuple(code)

    def keys(self, tokens: int) -> int:
        """The most keys that a query attends, of ``tokens``."""
        return self._keys

    @property
    @remembered
    def _keys(self) -> int:
        return max([math.prod([window.kernel for window in self.windows[first]]) for first, _ in self.head_groups()])

    def sharing(self, heads: int) -> int:
        """As of ``Full``."""
        # Euclid by hand: torch.compile can't trace math.gcd of a number of heads that is symbolic.
        for first, _ in self.head_groups():
            while first:
                heads, first = first, heads % first
        return heads

    def head_groups(self) -> list[tuple[int, int]]:
        """Ranges ``(first, last + 1)`` of consecutive heads that share their windows."""
        bounds = [0]
        bounds += [head for head in range(1, len(self.windows)) if self.windows[head] != self.windows[head - 1]]
        return list(zip(bounds, [*bounds[1:], len(self.windows)], strict=True))


AnyNeighborhood = Full | Grid | Neighborhood

KINDS = (Full.kind, Grid.kind, Neighborhood.kind)


def decode(code: Sequence[int], axes: int) -> AnyNeighborhood:
    """Inverse of ``encode`` on maps of so many axes."""
    kind, values = code[0], list(code[1:])
    if kind == FULL:
        return Full()
    if kind == GRID:
        return Grid(tuple(values[-axes:]))
    windows = [AxisWindow(*values[i : i + 3], bool(values[i + 3])) for i in range(0, len(values), 4)]
    heads = [windows[i : i + MAP_AXES] for i in range(0, len(windows), MAP_AXES)]
    return Neighborhood(tuple(tuple(head[-axes:]) for head in heads))


def indices(count: int) -> torch.Tensor:
    """``0, 1, ..., count - 1``: int64 on the CPU, whatever the default device is."""
    return torch.arange(count, dtype=torch.int64, device="cpu")


class AxisKeys(NamedTuple):
    """The keys of several queries on one axis, int64 ``(queries, kernel)`` on the CPU."""

    index: torch.Tensor
    """Where they are. A query with fewer keys has its first one again in the place of the missing."""
    offset: torch.Tensor
    """Key minus query, in units of the dilation."""
    exists: torch.Tensor
    """Whether it is a key; bool."""


def axis_keys(queries: Iterable[int], length: int, window: AxisWindow) -> AxisKeys:
    """The keys that the queries see on an axis of this length."""
    queries = list(queries)
    ranges = [window.keys(query, length) for query in queries]
    start = torch.tensor([keys.start for keys in ranges], dtype=torch.int64, device="cpu")[:, None]
    count = torch.tensor([len(keys) for keys in ranges], dtype=torch.int64, device="cpu")[:, None]
    steps = indices(window.kernel)
    exists = steps < count
    index = start + torch.where(exists, steps, 0) * window.dilation
    own = torch.tensor(queries, dtype=torch.int64, device="cpu")[:, None]
    return AxisKeys(index, (index - own) // window.dilation, exists)


def window_offsets(window: int) -> torch.Tensor:
    """Key minus query on one axis of a grid window: int64 ``(window, window)`` on the CPU, queries first."""
    return indices(window)[None, :] - indices(window)[:, None]
