"""What the benchmark of gpu_check measures, most wanted first, so that whatever time there is goes to what counts.

A cell is one named shape in one precision, all orders, all candidates of one of two passes: ``quick`` (ours, plain
PyTorch, SDPA, NATTEN) and ``compiled`` (ours again, beside what compiles for every shape: FlexAttention and NATTEN's
kernels on it).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.shapes import SHAPES
from benchmarks.suites import SUITES

# The shapes that the figures to reach are about.
FIGURES = ("nat-256", "nat-512", "nat-1024", "nat-128")
# Shapes on which FlexAttention with a block mask is compared first.
BESIDE_FLEX = ("nat-64", "nat-128", "nat-256", "nat-32", "nat-16", "nat-8", "nat-512", "nat-1024")


@dataclass(frozen=True)
class Cell:
    shape: str
    precision: str
    candidates: str  # "quick" or "compiled"

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.precision}, {self.candidates}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cells(suite: str, precisions: list[str]) -> list[Cell]:
    """Every cell of a suite once; ``precisions[0]`` is the one that the figures to reach are about."""
    names = [shape.name for shape in SUITES[suite]]
    by_size = sorted(names, key=lambda name: (name not in FIGURES, name not in BESIDE_FLEX, _elements(name)))
    first, *others = precisions
    flex = [name for name in BESIDE_FLEX if name in names]
    plan = [
        *(Cell(name, first, "quick") for name in by_size),
        *(Cell(name, first, "compiled") for name in flex[:3]),
        *(Cell(name, precision, "quick") for precision in others for name in by_size),
        *(Cell(name, first, "compiled") for name in [*flex[3:], *(name for name in by_size if name not in flex)]),
        *(Cell(name, precision, "compiled") for precision in others for name in by_size),
    ]
    return plan


def _elements(name: str) -> int:
    shape = SHAPES[name]
    return shape.batch * shape.queries * shape.heads * shape.head_dim * shape.keys_per_query
