"""Draws the memory of each order of neighborhood attention over the side of the map, ours and plain PyTorch's.

    python -m docs.draw_memory        # writes docs/img/memory.png; measures for a minute

Needs matplotlib. Memory is what `benchmarks.memory` calls `beyond`: the peak of one operator beyond its operands and
results.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import torch

from benchmarks.memory_worker import MemoryWorker
from benchmarks.shapes import SHAPES, Shape

matplotlib.use("agg")
import matplotlib.pyplot as plt

ORDERS = {"forward": "#1864ab", "backward": "#d9480f", "double": "#2b8a3e"}
LABELS = {"double": "double backward"}
SIDES = {"cpu": (32, 48, 64, 96, 128, 192, 256), "naive": (32, 48, 64, 96, 128)}  # naive: half a GiB at 128
NAMES = {"cpu": "natten_ext", "naive": "plain PyTorch"}


def shape_of(side: int) -> Shape:
    return replace(SHAPES["nat-64"], batch=1, heads=4, size=(side, side), dilations=(1, side // 8))


def main() -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    with MemoryWorker(threads=1) as worker:
        for candidate, sides in SIDES.items():
            for order, colour in ORDERS.items():
                found = [worker.measure(candidate, shape_of(side), torch.float32, order) for side in sides]
                label = f"{NAMES[candidate]}, {LABELS.get(order, order)}"
                style = {"color": colour, "linestyle": "-" if candidate == "cpu" else "--", "marker": "o"}
                axes.loglog(sides, [memory.beyond / 2**20 for memory in found], markersize=4, label=label, **style)
    axes.set_xticks(SIDES["cpu"], [f"{side}²" for side in SIDES["cpu"]])
    axes.minorticks_off()
    axes.set(xlabel="map", ylabel="MiB beyond operands and results")
    axes.grid(color="0.9")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(0, 0.41), ncols=2)
    axes.set_title("neighborhood attention, kernel 7, 4 heads of 32 channels, float32, one thread", fontsize=9)
    figure.savefig(Path(__file__).parent / "img" / "memory.png", dpi=110)


if __name__ == "__main__":
    main()
