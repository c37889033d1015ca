"""Figures of a run, from its sample grids and its log."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from gans.data.images import GAP
from gans.evaluation import metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def read_tiles(path: Path, size: int) -> list[np.ndarray]:
    """The images of a sample grid, with the blank ones that fill up its last row. Grids of earlier versions have no
    gaps.
    """
    grid = np.asarray(Image.open(path))
    step = size + _gap(grid, size)
    rows, columns = (range(0, length, step) for length in grid.shape[:2])
    return [grid[y : y + size, x : x + size] for y in rows for x in columns]


def _gap(grid: np.ndarray, size: int) -> int:
    """Pixels between the images of a grid: they are white from end to end."""
    height, width = grid.shape[:2]
    fits = all((length + GAP) % (size + GAP) == 0 for length in (height, width))
    lines = [grid[:, x : x + GAP] for x in range(size, width, size + GAP)]
    lines += [grid[y : y + GAP] for y in range(size, height, size + GAP)]
    return GAP if fits and all((line == 255).all() for line in lines) else 0


def sample_steps(run: Path) -> list[int]:
    """The steps of which a run has sample grids; files with other names are not its own."""
    names = (re.fullmatch(r"step-([0-9]{8,})\.png", path.name) for path in (run / "samples").glob("*"))
    return sorted(int(name[1]) for name in names if name)


def plot_samples(run: Path, steps: Sequence[int], size: int, path: Path, columns: int = 12) -> None:
    """A row of samples, from the same z, for each of the steps that has a grid, three for the last of them, and two
    rows of real images.
    """
    shown = [step for step in sample_steps(run) if step in steps]
    grids = [(f"step {step}", f"step-{step:08d}.png", 3 if step == shown[-1] else 1) for step in shown]
    rows = []
    for label, name, count in [*grids, ("real", "real.png", 2)]:
        tiles = read_tiles(run / "samples" / name, size)
        starts = range(0, min(count * columns, len(tiles)), columns)
        rows += [("" if start else label, tiles[start : start + columns]) for start in starts]
    figure, axes = plt.subplots(len(rows), columns, figsize=(0.62 * columns + 1, 0.62 * len(rows) + 0.5), squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    for line, (label, tiles) in zip(axes, rows, strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for axis, tile in zip(line, tiles, strict=False):
            axis.imshow(tile, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    figure.suptitle("samples from fixed z during training, and real images", fontsize=10)
    figure.subplots_adjust(left=0.12, right=0.995, bottom=0.005, top=0.93, wspace=0.05, hspace=0.05)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def nearest(tile: np.ndarray, real: np.ndarray, count: int) -> np.ndarray:
    """The numbers of the `count` real images `(N, ...)` whose pixels are nearest to those of `tile`."""
    rows, row = real.reshape(len(real), -1).astype(np.float32), tile.reshape(-1).astype(np.float32)
    return np.argsort(np.square(rows).sum(1) - 2 * rows @ row, kind="stable")[:count]


def plot_neighbours(tiles: Sequence[np.ndarray], real: np.ndarray, path: Path) -> None:
    """Samples, and below each the two real images `(N, H, W[, 3])` nearest to it: copies would show."""
    columns = [[tile, *real[nearest(tile, real, 2)]] for tile in tiles]
    figure, axes = plt.subplots(3, len(columns), figsize=(0.8 * len(columns) + 1, 2.6), squeeze=False)
    for line, label in zip(axes, ("sample", "nearest", "second"), strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for column, images in zip(axes.T, columns, strict=True):
        for axis, image in zip(column, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    figure.subplots_adjust(left=0.12, right=0.995, bottom=0.01, top=0.99, wspace=0.05, hspace=0.05)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_curves(lines: Sequence[dict[str, float]], path: Path, distance: str = "distance") -> None:
    """Each network's loss terms, and the distance to the real images with its floor if the run measured it.

    `distance` is the distance's name.
    """
    distances = metrics.distances(lines)
    panels = 3 if distances else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 3.6), layout="constrained", squeeze=False)
    for axis, network in zip(axes[0], ("discriminator", "generator"), strict=False):
        names = dict.fromkeys(name for line in lines for name in line if name.startswith(f"{network}/"))
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            faint = {"alpha": 0.5, "linestyle": ":"} if name.endswith("gradient_norm") else {}
            label = name.removeprefix(f"{network}/").replace("_", " ")
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1, **faint)
        axis.set(title=network, xlabel="generator step")
        largest = max((abs(line[name]) for line in lines for name in names if name in line), default=0)
        if largest > 10:  # the first penalties can be a hundred times the later ones
            axis.set_yscale("symlog", linthresh=1)
    if distances:
        axis = axes[0, 2]
        points = [(line["step"], line["distance"]) for line in distances]
        axis.semilogy(*zip(*points, strict=True), marker=".", label="averaged generator")
        axis.axhline(distances[-1]["floor"], color="gray", linestyle="--", label="real against real")
        axis.set(title=f"{distance} to real images", xlabel="generator step")
    for axis in axes[0]:
        if axis.lines:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
