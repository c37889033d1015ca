"""Draws the three neighborhoods of the README: which keys one query attends.

    python docs/draw_neighborhoods.py        # writes docs/img/neighborhoods.png

The marked keys are those to which `natten_ext.attention_weights` gives a weight, so the drawing can't differ from the
operators. Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

import natten_ext

matplotlib.use("agg")
import matplotlib.pyplot as plt

SIDE = 16
QUERIES = ((6, 9), (15, 1))  # one inside, one at a border
COLOURS = ("#d9480f", "#1864ab")
PANELS = (
    ("full: every key", {}),
    ("grid, window 8: the query's own window", {"window_size": 8}),
    ("neighborhood, kernel 5, dilation 1", {"kernel_size": 5}),
    ("neighborhood, kernel 5, dilation 3", {"kernel_size": 5, "dilation": 3}),
)


def draw(axes: plt.Axes, title: str, neighborhood: dict[str, int]) -> None:
    """One map of pixels: the queries as dots, and squares of the same colour over the keys that they attend."""
    pixels = torch.zeros(1, SIDE, SIDE, 1, 1)
    weights = natten_ext.attention_weights(pixels, pixels, QUERIES, **neighborhood)[0, :, 0]
    for (row, column), colour, attended in zip(QUERIES, COLOURS, weights, strict=True):
        for y, x in attended.nonzero().tolist():
            axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour, alpha=0.35, linewidth=0))
        axes.plot(column, row, "o", color=colour, markersize=7)
    axes.set_xticks([x - 0.5 for x in range(SIDE + 1)], [])
    axes.set_yticks([y - 0.5 for y in range(SIDE + 1)], [])
    axes.grid(color="0.8", linewidth=0.6)
    axes.tick_params(length=0)
    axes.set(xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5), aspect="equal")
    axes.set_title(title, fontsize=9)


def main() -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3.6), layout="constrained")
    for place, panel in zip(axes, PANELS, strict=True):
        draw(place, *panel)
    figure.savefig(Path(__file__).parent / "img" / "neighborhoods.png", dpi=110)


if __name__ == "__main__":
    main()
