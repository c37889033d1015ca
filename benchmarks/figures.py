"""The figures to reach, on CPUs and GPUs: what was aimed at, what was measured, and whether that is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

from .problem import ORDERS
from .record import Record, Row

OPERATORS = {
    "forward": "forward", "backward": "backward alone", "double": "double backward alone", "tangent": "tangent alone",
}  # fmt: skip

Cell = dict[str, Row]
"""All candidates on one shape and order."""


@dataclass(frozen=True)
class Figure:
    """One of the figures to reach. ``met`` is None where it was not measured, or not on every shape it is about."""

    backend: str
    name: str
    target: str
    value: float | None
    met: bool | None
    text: str

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]


@dataclass(frozen=True)
class Goal:
    """A figure by order. ``value`` is that of a backend in one cell.

    ``of``: "least", "largest" (at most the target) or "geometric mean" over the shapes. ``shapes``: only these, and it
    is met only where all were measured. ``alone``: about operators alone, not whole steps. ``more``: added to the text.
    """

    name: str
    targets: dict[str, float]
    value: Callable[[Cell, str], float | None]
    of: str = "least"
    unit: str = "x"
    shapes: tuple[str, ...] = ()
    alone: bool = False
    more: Callable[[list[Cell], str], str] = lambda cells, backend: ""


def over(peers: str, field: str = "timing") -> Callable[[Cell, str], float | None]:
    """Time of the fastest of the candidates whose names match, over ours."""

    def value(cell: Cell, backend: str) -> float | None:
        mine = getattr(cell[backend], field)
        theirs = [t.median for name, row in cell.items() if fnmatch(name, peers) and (t := getattr(row, field))]
        return min(theirs) / mine.median if mine and theirs else None

    return value


def of_row(field: str) -> Callable[[Cell, str], float | None]:
    return lambda cell, backend: getattr(cell[backend], field)


def memory(cell: Cell, backend: str) -> float | None:
    return cell[backend].memory.ratio if backend in cell and cell[backend].memory else None


def _against_reference(cells: list[Cell], backend: str) -> str:
    """The mean against one form of naive alone, for comparison."""
    ratios = [
        cell["naive"].timing.median / cell[backend].timing.median
        for cell in cells
        if cell[backend].timing and "naive" in cell and cell["naive"].timing
    ]
    return f"; {geometric_mean(ratios):.2f}x against the reference backend alone" if ratios else ""


def _naive_memory(cells: list[Cell], backend: str) -> str:
    ratios = [ratio for cell in cells if (ratio := memory(cell, "naive"))]
    return f"; naive {min(ratios):.1f} to {max(ratios):.1f}" if ratios else ""


MEMORY = Goal("memory beyond / returned", dict.fromkeys(ORDERS, 0.25), memory, "largest", unit="", more=_naive_memory)
GOALS = {
    "cpu": (
        Goal(
            "naive / ours", {"forward": 5, "backward": 5, "double": 5, "tangent": 3}, of_row("ratio"), "geometric mean",
            more=_against_reference,
        ),
        Goal("naive / ours", dict.fromkeys(ORDERS, 1.5), of_row("ratio")),
        Goal("fused SDPA / ours", {"forward": 0.9, "backward": 0.9}, over("sdpa"), shapes=("full-1k",)),
        Goal(
            "percent of the FMA peak", {"forward": 40}, of_row("fma_percent"), unit="%",
            shapes=("nat-16", "nat-32", "nat-64", "nat-256", "nat-512"),
        ),
        Goal("times the forward", {"tangent": 3}, of_row("forwards"), "largest"),
        Goal("times the forward", {"tangent": 2.6}, of_row("alone_forwards"), "largest", alone=True),
        MEMORY,
    ),
    "cuda": (
        Goal(
            "percent of the floor", {"forward": 75, "backward": 60, "double": 45}, of_row("alone_percent"), unit="%",
            shapes=("nat-128", "nat-256", "nat-512"), alone=True,
        ),
        Goal(
            "percent of the floor", {"forward": 60, "backward": 45, "double": 35}, of_row("alone_percent"), unit="%",
            shapes=("nat-1024",), alone=True,
        ),
        Goal("naive / ours", dict.fromkeys(ORDERS, 1), of_row("ratio")),
        Goal("NATTEN (without the table) / ours", {"forward": 3, "backward": 3}, over("natten*")),
        Goal("FlexAttention / ours", {"forward": 2, "backward": 2}, over("flex")),
        Goal("SDPA MATH / ours", {"double": 8}, over("sdpa-math", "alone"), alone=True),
        MEMORY,
    ),
}  # fmt: skip
"""By device. Those of CPUs are about whole steps in float32; on GPUs, in bfloat16, shares of the floor and second
derivatives are about operators alone."""
PRECISION = {"cpu": "float32", "cuda": "bfloat16"}


def figures_to_reach(record: Record) -> list[Figure]:
    """Every figure of a record's device and orders, for each of our backends; none in another precision."""
    device = "cuda" if "gpu" in record.environment else "cpu"
    if record.precision != PRECISION[device]:
        return []
    return [figure for backend in record.ours for goal in GOALS[device] for figure in _figures(goal, backend, record)]


def _figures(goal: Goal, backend: str, record: Record) -> Iterator[Figure]:
    for order, target in goal.targets.items():
        if order not in record.orders:
            continue
        cells = {
            shape: cell
            for (shape, of), cell in record.cells.items()
            if of == order and backend in cell and (not goal.shapes or shape in goal.shapes)
        }
        values = {shape: value for shape, cell in cells.items() if (value := goal.value(cell, backend)) is not None}
        name = f"{OPERATORS[order] if goal.alone else order}: {goal.name}"
        if len(goal.shapes) == 1:
            name += f" on {goal.shapes[0]}"
        else:
            name += f"{', ' + goal.shapes[0] + ' to ' + goal.shapes[-1] if goal.shapes else ''}, {goal.of}"
        wanted = f"{'<=' if goal.of == 'largest' else '>='} {target:g}"
        if not values:
            yield Figure(backend, name, wanted, None, None, "")
            continue
        value, text = _summary(goal, values)
        met: bool | None = value <= target if goal.of == "largest" else value >= target
        if met and set(goal.shapes) - set(values):
            met = None
        yield Figure(backend, name, wanted, value, met, text + goal.more(list(cells.values()), backend))


def _summary(goal: Goal, values: dict[str, float]) -> tuple[float, str]:
    """The one value that counts, and it in words: a few values one by one, of many the one that decides."""

    def number(value: float) -> str:
        return f"{value:.0f}%" if goal.unit == "%" else f"{value:.2f}{goal.unit}"

    if goal.of == "geometric mean":
        mean = geometric_mean(values.values())
        return mean, f"{number(mean)} of {len(values)} shapes"
    worst = (max if goal.of == "largest" else min)(values, key=values.__getitem__)
    if len(goal.shapes) == 1:
        return values[worst], number(values[worst])
    if goal.shapes:
        return values[worst], ", ".join(f"{name} {number(value)}" for name, value in values.items())
    return values[worst], f"{number(values[worst])} on {worst}, of {len(values)}"


def figures_block(figures: list[Figure]) -> str:
    """The figures that were measured as a table of plain text."""
    measured = [figure for figure in figures if figure.value is not None]
    lines = ["Figures to reach" if measured else "No figure to reach was measured."]
    for figure in measured:
        lines.append(f"  {figure.verdict:<13}{figure.backend:<8}{figure.name:<60}{figure.target:>8}   {figure.text}")
    return "\n".join(lines)


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
