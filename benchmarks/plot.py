"""The figure: how much faster than naive, and how much memory, by shape and order.

Redraw from a result: ``python -m benchmarks.plot result.json figure.png``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ORDER_NAMES = {
    "forward": "forward",
    "backward": "forward + backward",
    "double": "gradient penalty (second order)",
}
COLORS = {"forward": "#7fb3d5", "backward": "#2874a6", "double": "#1b2f45"}
PEER_MARKS = {
    "sdpa": "D",
    "sdpa-flash": "D",
    "sdpa-efficient": "s",
    "sdpa-cudnn": "^",
    "sdpa-math": "v",
    "flex": "P",
    "natten": "*",
}
NAIVE_COLOR, LIMIT_COLOR, PEER_COLOR = "#c9c9c9", "#b03a2e", "#e08e0b"


def draw(rows: list[dict[str, Any]], environment: dict[str, Any], path: Path) -> None:
    """Draw the rows of a result (``Row.to_dict``): one figure for each of our backends in turn, side by side."""
    backends = list(dict.fromkeys(row["candidate"] for row in rows if row["group"] == "ours"))
    backends = backends or ["naive"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    orders = [order for order in ORDER_NAMES if any(row["order"] == order for row in rows)]
    width = max(7.0, 1.5 + 0.75 * len(shapes))
    figure, axes = plt.subplots(
        2,
        len(backends),
        figsize=(width * len(backends), 8.4),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    figure.suptitle(f"natten_ext on {where}, torch {environment['torch']}", fontsize=12, x=0.01, ha="left")
    for column, backend in enumerate(backends):
        _draw_speed(axes[0][column], rows, backend, shapes, orders)
        _draw_memory(axes[1][column], rows, backend, shapes, orders)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _cell(rows, shape, order, candidate):
    for row in rows:
        if (row["shape"], row["order"], row["candidate"]) == (shape, order, candidate):
            return row
    return None


def _draw_speed(axis, rows, backend, shapes, orders) -> None:
    bar = 0.8 / len(orders)
    peers = [c for c in dict.fromkeys(r["candidate"] for r in rows if r["group"] == "peer") if c in PEER_MARKS]
    labelled = set()
    for i, order in enumerate(orders):
        for x, shape in enumerate(shapes):
            place = x + (i - (len(orders) - 1) / 2) * bar
            row = _cell(rows, shape, order, backend)
            if row and row["ratio"]:
                axis.bar(
                    place,
                    row["ratio"],
                    bar * 0.92,
                    color=COLORS[order],
                    label=_once(labelled, ORDER_NAMES[order]),
                )
            for peer in peers:
                row = _cell(rows, shape, order, peer)
                if row and row["ratio"]:
                    axis.plot(
                        place, row["ratio"], PEER_MARKS[peer], color=PEER_COLOR, markeredgecolor="white",
                        markersize=7, linestyle="none", label=_once(labelled, peer), zorder=3,
                    )  # fmt: skip
    axis.axhline(1, color="#555555", linewidth=1)
    axis.set_yscale("log")
    axis.set_ylabel("times faster than the fastest naive PyTorch")
    axis.set_title(f"Speed of {backend} (bars) and of peers (marks); no mark: the peer cannot", loc="left", fontsize=10)
    _finish(axis, shapes)


def _draw_memory(axis, rows, backend, shapes, orders) -> None:
    bar = 0.8 / len(orders)
    labelled = set()
    for i, order in enumerate(orders):
        for x, shape in enumerate(shapes):
            place = x + (i - (len(orders) - 1) / 2) * bar
            for candidate, color, label in (
                ("naive", NAIVE_COLOR, "naive"),
                (backend, COLORS[order], ORDER_NAMES[order]),
            ):
                row = _cell(rows, shape, order, candidate)
                if row and row["memory"]:
                    # On a logarithmic axis a bar needs a positive height: 0.001 stands for nothing measurable.
                    height = max(row["memory"]["ratio"], 1e-3)
                    axis.bar(place, height, bar * 0.92, color=color, label=_once(labelled, label))
    axis.axhline(0.25, color=LIMIT_COLOR, linewidth=1.2, linestyle="--", label="goal: at most 0.25")
    axis.set_yscale("log")
    axis.set_ylabel("peak memory beyond inputs and results,\nrelative to the results")
    axis.set_title(f"Extra memory of {backend} (coloured) in front of naive's (grey)", loc="left", fontsize=10)
    _finish(axis, shapes)


def _once(labelled: set[str], label: str) -> str:
    """The label at its first use, afterwards one that the legend leaves out."""
    if label in labelled:
        return "_"
    labelled.add(label)
    return label


def _finish(axis, shapes) -> None:
    axis.set_xticks(range(len(shapes)), shapes, rotation=35, ha="right")
    axis.set_xlim(-0.6, len(shapes) - 0.4)
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    handles, _ = axis.get_legend_handles_labels()
    if handles:
        axis.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.06), borderaxespad=0)


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text())
    draw(result["rows"], result["environment"], Path(sys.argv[2]))


if __name__ == "__main__":
    main()
