"""Which keys a query attends: the one Python definition of every neighborhood.

The C++ twin is ``csrc/geometry.h``; ``tests/operators/test_geometry.py`` holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

IntPair = tuple[int, int]

# Leading code of the integer list that describes a neighborhood to the operators (csrc/problem.h).
FULL, GRID, NEIGHBORHOOD = 0, 1, 2


@dataclass(frozen=True)
class Full:
    """Every query attends every key."""

    kind: ClassVar[str] = "full"

    def keys(self, tokens: int) -> int:
        """The most keys that a query attends, of ``tokens``."""
        return tokens

    def encode(self) -> list[int]:
        return [FULL]


@dataclass(frozen=True)
class Grid:
    """Every query attends the keys of the non-overlapping ``window`` (height, width) that holds it."""

    window: IntPair
    kind: ClassVar[str] = "grid"

    @property
    def kernel(self) -> IntPair:
        """Extent that sizes the relative position table."""
        return self.window

    def keys(self, tokens: int) -> int:
        """The most keys that a query attends, of ``tokens``."""
        return self.window[0] * self.window[1]

    def encode(self) -> list[int]:
        return [GRID, *self.window]


@dataclass(frozen=True)
class Neighborhood:
    """Sliding window with a kernel size and a dilation per head, each a (height, width) pair.

    A query attends exactly ``kernel`` keys of its residue class modulo the dilation. The window is
    centred on the query and shifted inward at the borders, never padded (Hassani et al.,
    "Neighborhood Attention Transformer", arXiv 2204.07143; dilated: arXiv 2209.15001).
    """

    kernels: tuple[IntPair, ...]
    dilations: tuple[IntPair, ...]
    kind: ClassVar[str] = "neighborhood"

    @property
    def kernel(self) -> IntPair:
        """Largest kernel over the heads: the extent that sizes the relative position table."""
        return max(k[0] for k in self.kernels), max(k[1] for k in self.kernels)

    def encode(self) -> list[int]:
        code = [NEIGHBORHOOD]
        for kernel, dilation in zip(self.kernels, self.dilations, strict=True):
            code += [*kernel, *dilation]
        return code

    def keys(self, tokens: int) -> int:
        """The most keys that a query attends, of ``tokens``."""
        return max(rows * columns for rows, columns in self.kernels)

    def head_groups(self) -> list[tuple[int, int]]:
        """Ranges ``(first, last + 1)`` of consecutive heads that share kernel and dilation."""
        bounds = [0]
        for head in range(1, len(self.kernels)):
            if (self.kernels[head], self.dilations[head]) != (
                self.kernels[head - 1],
                self.dilations[head - 1],
            ):
                bounds.append(head)
        return list(zip(bounds, [*bounds[1:], len(self.kernels)], strict=True))


AnyNeighborhood = Full | Grid | Neighborhood

KINDS = (Full.kind, Grid.kind, Neighborhood.kind)


def decode(code: Sequence[int]) -> AnyNeighborhood:
    """Inverse of ``encode``."""
    kind, rest = code[0], list(code[1:])
    if kind == FULL:
        return Full()
    if kind == GRID:
        return Grid((rest[0], rest[1]))
    quads = [rest[i : i + 4] for i in range(0, len(rest), 4)]
    return Neighborhood(tuple((q[0], q[1]) for q in quads), tuple((q[2], q[3]) for q in quads))


def window_start(index: int, length: int, kernel: int, dilation: int) -> int:
    """First key on one axis of the window of the query at ``index``; the next keys follow ``dilation`` apart."""
    residue, position = index % dilation, index // dilation
    class_length = (length - residue + dilation - 1) // dilation
    start = min(max(position - kernel // 2, 0), class_length - kernel)
    return start * dilation + residue


def indices(count: int) -> torch.Tensor:
    """``0, 1, ..., count - 1``: int64 on the CPU, whatever the default device is."""
    return torch.arange(count, dtype=torch.int64, device="cpu")


def window_starts(queries: Iterable[int], length: int, kernel: int, dilation: int) -> torch.Tensor:
    """``window_start`` of several queries: int64 on the CPU."""
    starts = [window_start(i, length, kernel, dilation) for i in queries]
    return torch.tensor(starts, dtype=torch.int64, device="cpu")


def neighbor_indices(length: int, kernel: int, dilation: int) -> torch.Tensor:
    """Keys of every query on one axis: int64 ``(length, kernel)`` on the CPU."""
    return window_starts(range(length), length, kernel, dilation)[:, None] + dilation * indices(kernel)


def neighbor_offsets(length: int, kernel: int, dilation: int) -> torch.Tensor:
    """Key minus query on one axis, in units of the dilation: int64 ``(length, kernel)`` on the CPU."""
    return (neighbor_indices(length, kernel, dilation) - indices(length)[:, None]) // dilation


def window_offsets(window: int) -> torch.Tensor:
    """Key minus query on one axis of a grid window: int64 ``(window, window)`` on the CPU, queries first."""
    return indices(window)[None, :] - indices(window)[:, None]
