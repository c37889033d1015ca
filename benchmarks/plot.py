"""The figure: how much faster than naive, and how much memory, by shape and order.

Redraw from a result: ``python -m benchmarks.plot result.json figure.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from .figures import OPERATORS
from .record import Record, Row, output_file

ORDERS = {
    "forward": "forward", "backward": "forward + backward", "double": "gradient penalty (second order)",
    "tangent": "forward + tangent (forward mode)",
}  # fmt: skip
COLORS = {"forward": "#8ec1de", "backward": "#2f7fb8", "double": "#16324f", "tangent": "#7fb069"}
PEERS = {
    "sdpa": ("D", "#e08e0b"),
    "sdpa-flash": ("D", "#e08e0b"),
    "sdpa-efficient": ("s", "#c2571a"),
    "sdpa-cudnn": ("^", "#b03a2e"),
    "sdpa-math": ("v", "#8e6bb0"),
    "flex": ("P", "#3a9d5d"),
    "natten": ("*", "#d6336c"),
}
NAIVE, GOAL, LINE = "#9a9a9a", "#b03a2e", "#444444"
SMALLEST = 1e-3  # drawn for ratios of memory below it: nothing that can be measured


class Result:
    """Rows of a record with the places of their bars."""

    def __init__(self, record: Record) -> None:
        self.rows = {(row.shape.name, row.order, row.candidate): row for row in record.rows}
        self.shapes = list(record.shapes)
        self.orders = record.orders
        self.backends = record.ours
        self.bar = 0.8 / len(self.orders)

    def of(self, candidate: str) -> Iterator[tuple[float, str, Row]]:
        """Place, order and row of every bar that a candidate has."""
        for x, shape in enumerate(self.shapes):
            for i, order in enumerate(self.orders):
                row = self.rows.get((shape, order, candidate))
                if row:
                    yield x + (i - (len(self.orders) - 1) / 2) * self.bar, order, row


def draw(record: Record, path: Path) -> None:
    """One column for each of our backends (or for naive alone): speed above, memory below."""
    result, environment = Result(record), record.environment
    backends = result.backends or ["naive"]
    width = max(8.0, 1.5 + 0.8 * len(result.shapes))
    figure, axes = plt.subplots(
        2, len(backends), figsize=(width * len(backends), 9.2), squeeze=False, sharey="row", layout="constrained"
    )
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    figure.suptitle(f"natten_ext on {where}, torch {environment['torch']}", fontsize=12, x=0.01, ha="left")
    for column, backend in enumerate(backends):
        _draw_speed(axes[0][column], result, backend)
        _draw_memory(axes[1][column], result, backend)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_speed(axis: Axes, result: Result, backend: str) -> None:
    handles = [Patch(color=COLORS[order], label=ORDERS[order]) for order in result.orders]
    for place, order, row in result.of(backend):
        if row.ratio:
            axis.bar(place, row.ratio - 1, result.bar * 0.92, bottom=1, color=COLORS[order])
            above = row.ratio >= 1
            axis.annotate(
                f"{row.ratio:.1f}", (place, row.ratio), (0, 2 if above else -2), textcoords="offset points",
                ha="center", va="bottom" if above else "top", fontsize=6, color=LINE,
            )  # fmt: skip
    for peer, (mark, color) in PEERS.items():
        drawn = False
        for place, _, row in result.of(peer):
            if row.ratio:
                axis.plot(place, row.ratio, mark, color=color, markeredgecolor="white", markersize=7, zorder=3)
                drawn = True
        if drawn:
            handles.append(Line2D([], [], marker=mark, color=color, linestyle="none", label=peer))
    axis.axhline(1, color=LINE, linewidth=1)
    axis.set_yscale("log")
    axis.set_ylabel("times the speed of the fastest naive PyTorch")
    _finish(axis, result, f"Speed of {backend} (bars) and of peers (marks; none where a peer cannot)", handles)


def _draw_memory(axis: Axes, result: Result, backend: str) -> None:
    naive = {(row.shape.name, order): row for _, order, row in result.of("naive")}
    for place, order, row in result.of(backend):
        other = naive.get((row.shape.name, order))
        heights = [max(SMALLEST, r.memory.ratio) for r in (row, other) if r and r.memory]
        if row.memory:
            axis.plot(place, heights[0], "o", color=COLORS[order], markersize=7, zorder=3)
        if other and other.memory:
            axis.plot(place, heights[-1], "_", color=NAIVE, markersize=9, markeredgewidth=2.5, zorder=2)
        if len(heights) == 2:
            axis.plot([place, place], heights, color=NAIVE, linewidth=0.8, zorder=1)
    axis.axhline(0.25, color=GOAL, linewidth=1.2, linestyle="--")
    axis.set_yscale("log")
    axis.set_ylabel("peak memory beyond inputs and results,\nrelative to the results")
    handles = [
        *(Line2D([], [], marker="o", color=COLORS[o], linestyle="none", label=OPERATORS[o]) for o in result.orders),
        Line2D([], [], marker="_", color=NAIVE, linestyle="none", markersize=9, markeredgewidth=2.5, label="naive"),
        Line2D([], [], color=GOAL, linestyle="--", label="goal: at most 0.25"),
    ]
    _finish(axis, result, f"Extra memory of {backend} and of naive, each order's operator alone", handles)


def _finish(axis: Axes, result: Result, title: str, handles: list[Any]) -> None:
    axis.set_xticks(range(len(result.shapes)), result.shapes, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.6, len(result.shapes) - 0.4)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, loc="left", fontsize=10, pad=26)
    axis.legend(
        handles=handles, fontsize=8, frameon=False, ncols=len(handles), loc="lower left", bbox_to_anchor=(-0.01, 1.0),
        borderaxespad=0.2, handletextpad=0.4, columnspacing=1.2,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("figure", type=output_file)
    options = parser.parse_args(arguments)
    try:
        record = Record.read(options.result)
        if not record.rows:
            raise ValueError(f"{options.result} has no times to draw")
        draw(record, options.figure)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
