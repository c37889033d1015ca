"""The figures that the GPU backends are to reach, computed from the rows of a gpu_check document.

All are about bfloat16. Percentages of the floor and ratios between our backends compare operators alone (the backward
without its forward); ratios to other libraries compare whole steps, except for second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.figures import Figure, geometric_mean
from benchmarks.shapes import SHAPES

Row = dict[str, Any]

PRECISION = "bfloat16"
ORDERS = ("forward", "backward", "double")
LARGE = ("nat-128", "nat-256", "nat-512", "nat-1024")
NEIGHBORHOODS = tuple(name for name, shape in SHAPES.items() if shape.kind == "neighborhood")
OPERATORS = {"forward": "forward", "backward": "backward alone", "double": "double backward alone"}
MEMORY_GOAL = 0.25


class Rows:
    """The rows of one precision that were timed, by pass, by shape and order, and by candidate."""

    def __init__(self, rows: Iterable[Row], precision: str = PRECISION) -> None:
        self._passes: dict[str, dict[tuple[str, str], dict[str, Row]]] = {"quick": {}, "compiled": {}}
        for row in rows:
            if row["precision"] == precision and row["median"]:
                cell = self._passes[row["pass"]].setdefault((row["shape"], row["order"]), {})
                cell[row["candidate"]] = row
        timed = {shape for cells in self._passes.values() for shape, _ in cells}
        self.shapes = [name for name in SHAPES if name in timed]
        self.candidates = {name for cells in self._passes.values() for cell in cells.values() for name in cell}

    def get(self, shape: str, order: str, candidate: str) -> Row | None:
        """A row of the first pass, else of the second."""
        found = (cells.get((shape, order), {}).get(candidate) for cells in self._passes.values())
        return next((row for row in found if row), None)

    def percent(self, backend: str, order: str, shapes: Iterable[str]) -> dict[str, float]:
        """Percent of the floor, operators alone."""
        rows = {name: self.get(name, order, backend) for name in shapes}
        return {name: row["alone_percent"] for name, row in rows.items() if row and row["alone_percent"]}

    def ratio(
        self, peers: Callable[[str], bool], backend: str, order: str, shapes: Iterable[str], field: str = "median"
    ) -> dict[str, float]:
        """Time of the fastest of some peers over ours, measured in the same pass."""
        ratios = {}
        for name in shapes:
            found = []
            for cells in self._passes.values():
                cell = cells.get((name, order), {})
                theirs = [row[field] for peer, row in cell.items() if peers(peer) and row[field]]
                if backend in cell and cell[backend][field] and theirs:
                    found.append(min(theirs) / cell[backend][field])
            if found:
                ratios[name] = min(found)
        return ratios


def figures_to_reach(rows: Iterable[Row]) -> list[Figure]:
    """Every figure; ``met`` is None for what was not measured, or not on all shapes and met on those."""
    measured = Rows(rows)
    return [*_triton(measured), *_cuda(measured)]


def _triton(rows: Rows) -> list[Figure]:
    figures = []
    for order, goal in zip(ORDERS, (60, 45, 35), strict=True):
        shares = rows.percent("triton", order, LARGE)
        name = f"{OPERATORS[order]}, percent of the floor, nat-128 to nat-1024, least"
        figures.append(_least("triton", name, goal, shares, LARGE, "%"))
    flex = rows.ratio(lambda c: c == "flex", "triton", "backward", NEIGHBORHOODS)
    figures.append(_least("triton", "forward + backward: FlexAttention / ours, neighborhoods, least", 2, flex))
    sdpa = rows.ratio(lambda c: c.startswith("sdpa"), "triton", "backward", NEIGHBORHOODS)
    figures.append(_least("triton", "forward + backward: SDPA with a dense mask / ours, least", 3, sdpa))
    for where, shapes in (("neighborhoods", NEIGHBORHOODS), ("all named shapes", tuple(SHAPES))):
        math = rows.ratio(lambda c: c == "sdpa-math", "triton", "double", shapes, "alone")
        figures.append(_least("triton", f"double backward alone: SDPA MATH / ours, {where}, least", 8, math))
    for order in ORDERS:
        memory = {
            name: row["memory"]["ratio"]
            for name in rows.shapes
            if (row := rows.get(name, order, "triton")) and row["memory"]
        }
        name = f"{OPERATORS[order]}: memory beyond inputs and outputs / outputs, largest"
        if memory:
            worst = max(memory, key=memory.__getitem__)
            value, text = memory[worst], f"{memory[worst]:.2f} on {worst}, of {len(memory)} shapes"
            met = None if value <= MEMORY_GOAL and len(memory) < len(SHAPES) else value <= MEMORY_GOAL
            figures.append(Figure("triton", name, f"<= {MEMORY_GOAL}", value, met, text))
        else:
            figures.append(Figure("triton", name, f"<= {MEMORY_GOAL}", None, None, ""))
    return figures


def _cuda(rows: Rows) -> list[Figure]:
    figures = []
    for order, goal in zip(ORDERS, (75, 60, 50), strict=True):
        shares = rows.percent("cuda", order, SHAPES)
        name = f"{OPERATORS[order]}, percent of the floor, all named shapes, least"
        figures.append(_least("cuda", name, goal, shares, tuple(SHAPES), "%"))
    over_triton = {
        f"{name} {order}": ratio
        for order in ORDERS
        for name, ratio in rows.ratio(lambda c: c == "triton", "cuda", order, SHAPES, "alone").items()
    }
    wanted = tuple(f"{name} {order}" for order in ORDERS for name in SHAPES)
    figures.append(_least("cuda", "triton / cuda, every named shape and order, least", 1, over_triton, wanted))
    mean = geometric_mean(over_triton.values()) if over_triton else None
    met = None if mean is None or len(over_triton) < len(wanted) else mean >= 1.3
    text = "" if mean is None else f"{mean:.2f}x of {len(over_triton)}"
    figures.append(Figure("cuda", "triton / cuda, geometric mean", ">= 1.3", mean, met, text))
    natten = {
        f"{name} {order}": ratio
        for order in ("forward", "backward")
        for name, ratio in rows.ratio(lambda c: c.startswith("natten"), "cuda", order, NEIGHBORHOODS).items()
    }
    figures.append(_least("cuda", "NATTEN's fastest kernels (without the table) / cuda, whole layer, least", 3, natten))
    return figures


def _least(
    backend: str, name: str, goal: float, values: dict[str, float], wanted: tuple[str, ...] = (), unit: str = "x"
) -> Figure:
    """The smallest value against the goal. With ``wanted``, it is only met where all of those were measured."""
    target = f">= {goal:g}"
    if not values:
        return Figure(backend, name, target, None, None, "")
    worst = min(values, key=values.__getitem__)
    text = f"{values[worst]:.3g}{unit} on {worst}; geometric mean {geometric_mean(values.values()):.3g}{unit}"
    text += f" of {len(values)}" + (f" (of {len(wanted)} wanted)" if len(values) < len(wanted) else "")
    met = values[worst] >= goal
    return Figure(backend, name, target, values[worst], None if met and len(values) < len(wanted) else met, text)
