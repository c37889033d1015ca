"""Draws how a block of the CUDA kernels works: tile, halo, unit and fold.

    python docs/draw_tiles.py        # writes docs/img/tiles.png

Which keys the queries attend comes from `natten_ext.attention_weights`; tiles and blocks are those of
csrc/cuda/tiles.h. Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

import natten_ext

matplotlib.use("agg")
import matplotlib.pyplot as plt

SIDE, KERNEL = 24, 7
BLOCK = 8  # keys side by side; columns of a tile
WARPS = 4  # of two rows of queries each
ORIGIN = 8  # of the tile, on both axes
WARP = 1  # the one that the second and third panel look at
COLOURS = ("#1864ab", "#d9480f", "#2b8a3e", "#862e9c")
GREY = "#868e96"
Box = tuple[int, int, int, int]  # first row, first column, height, width


def attended(queries: list[tuple[int, int]]) -> torch.Tensor:
    """(queries, SIDE, SIDE), bool: which keys each query attends."""
    pixels = torch.zeros(1, SIDE, SIDE, 1, 1)
    return natten_ext.attention_weights(pixels, pixels, queries, kernel_size=KERNEL)[0, :, 0] > 0


def bounding_box(keys: torch.Tensor) -> Box:
    rows, columns = keys.any(1).nonzero(), keys.any(0).nonzero()
    y, x = int(rows.min()), int(columns.min())
    return y, x, int(rows.max()) + 1 - y, int(columns.max()) + 1 - x


def outline(axes: plt.Axes, box: Box, colour: str, **style: object) -> None:
    y, x, height, width = box
    axes.add_patch(plt.Rectangle((x, y), width, height, edgecolor=colour, **{"facecolor": "none", "lw": 1.8, **style}))


def ruled(axes: plt.Axes, title: str, width: int, height: int) -> None:
    """A panel of unit squares, the first one at the top left."""
    axes.set_xticks(range(width + 1), [])
    axes.set_yticks(range(height + 1), [])
    axes.grid(color="0.85", linewidth=0.6)
    axes.tick_params(length=0)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.set_title(title, fontsize=9)


def warp_queries(warp: int) -> list[tuple[int, int]]:
    return [(ORIGIN + 2 * warp + row, ORIGIN + column) for row in range(2) for column in range(BLOCK)]


def draw_tile(axes: plt.Axes) -> None:
    ruled(
        axes,
        f"A block's tile: 8 x 8 queries.\nGrey: its halo, all keys of their {KERNEL} x {KERNEL} windows",
        SIDE,
        SIDE,
    )
    halo = attended([query for warp in range(WARPS) for query in warp_queries(warp)]).any(0)
    outline(axes, bounding_box(halo), GREY, facecolor="#dee2e6", zorder=0)
    for warp, colour in enumerate(COLOURS):
        outline(axes, (ORIGIN + 2 * warp, ORIGIN, 2, BLOCK), colour, facecolor=colour, alpha=0.55)
        axes.text(
            ORIGIN + BLOCK / 2, ORIGIN + 2 * warp + 1, f"warp {warp}", ha="center", va="center", fontsize=7, color="w"
        )


def draw_units(axes: plt.Axes) -> None:
    ruled(
        axes,
        "What a warp goes through: units of two blocks of\neight keys, down the rows that its 16 queries attend",
        SIDE,
        SIDE,
    )
    y, x, height, width = bounding_box(attended(warp_queries(WARP)).any(0))
    outline(axes, (y, x, height, width), GREY, facecolor="#dee2e6", zorder=0)
    outline(axes, (ORIGIN + 2 * WARP, ORIGIN, 2, BLOCK), COLOURS[WARP], facecolor=COLOURS[WARP], alpha=0.55)
    for row in range(height):
        for block, colour in enumerate(COLOURS[:1] + COLOURS[2:3]):
            outline(axes, (y + row, x + block * BLOCK, 1, BLOCK), colour, lw=1.2)
        axes.text(x + 2 * BLOCK + 0.3, y + row + 0.5, f"unit {row}", va="center", fontsize=6, color="0.3")


def draw_fold(axes: plt.Axes) -> None:
    ruled(
        axes,
        "Pairs of one unit: eight queries, two blocks of keys.\nNo query has a column in both, so they fold into one",
        2 * BLOCK,
        2 * BLOCK + 2,
    )
    queries = warp_queries(WARP)[:BLOCK]
    _, x, _, _ = bounding_box(attended(queries).any(0))
    row = attended(queries)[:, queries[0][0]]
    for query in range(BLOCK):
        for key in range(2 * BLOCK):
            if row[query, x + key : x + key + 1].any():
                colour = (COLOURS[0], COLOURS[2])[key // BLOCK]
                for place in ((query, key), (query + BLOCK + 2, key % BLOCK + BLOCK // 2)):
                    outline(axes, (*place, 1, 1), "w", facecolor=colour, alpha=0.7, lw=0.6)
    for block, colour in enumerate((COLOURS[0], COLOURS[2])):
        outline(axes, (0, block * BLOCK, BLOCK, BLOCK), colour)
    outline(axes, (BLOCK + 2, BLOCK // 2, BLOCK, BLOCK), GREY)
    axes.annotate("", (BLOCK, BLOCK + 1.9), (BLOCK, BLOCK + 0.1), arrowprops={"arrowstyle": "->", "color": GREY})


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.2), layout="constrained")
    for place, draw in zip(axes, (draw_tile, draw_units, draw_fold), strict=True):
        draw(place)
    figure.savefig(Path(__file__).parent / "img" / "tiles.png", dpi=110)


if __name__ == "__main__":
    main()
