"""Where the attention of a model looks: recorded while it runs, and drawn.

The weights are those with which the model computes (`natten_ext.attention_weights`), not a stand-in for them: after the
softmax, with relative position tables, and zero outside a neighborhood.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from natten_ext import NeighborhoodAttention

Pixel = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True)
class AttentionMaps:
    """Where one attention module looks from some pixels."""

    name: str
    """The module's name in the model."""
    weights: Tensor
    """`(pixels, heads, height, width)` over the module's map, float32 on the CPU; each sums to 1."""
    positions: tuple[Pixel, ...]
    """The place of each pixel on that map."""
    groups: tuple[tuple[str, int, int], ...]
    """Ranges of heads with one label each: its dilation in a neighborhood, else none; first and last + 1."""


def groups_of_heads(module: nn.Module, heads: int) -> tuple[tuple[str, int, int], ...]:
    """A label for every group of heads that share a dilation; one group without a label elsewhere."""
    if not isinstance(module, NeighborhoodAttention) or not isinstance(module.dilation, list):
        return (("", 0, heads),)
    share = heads // len(module.dilation)
    dilations = [entry for entry in module.dilation for _ in range(share)]
    starts = [head for head in range(heads) if head == 0 or dilations[head] != dilations[head - 1]]
    ends = [*starts[1:], heads]
    return tuple((f"dilation {dilations[a]}", a, b) for a, b in zip(starts, ends, strict=True))


@dataclass(frozen=True)
class Recorded:
    """What an attention module of a model was given."""

    name: str
    """The module's name in the model."""
    module: nn.Module
    x: Tensor
    """The first image of the batch, `(1, N, dim)` or `(1, H, W, dim)`."""

    @property
    def extents(self) -> tuple[int, int]:
        """Height and width of the map; a sequence is taken for a square one, row by row."""
        if self.x.dim() == 4:
            return self.x.shape[1], self.x.shape[2]
        side = math.isqrt(self.x.shape[1])
        return side, side


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Recorded]]:
    """Inside, each forward pass of `model` appends what its attention modules are given, in their order.

    They are those with a method `attention_weights(x, positions)`: all of `natten_ext`'s, ViTGAN's and GAT's. Sequences
    that are no square map (with a class token) are left out, and so is attention from one map to another.
    """
    found: list[Recorded] = []

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entry = Recorded(name, module, inputs[0][:1].detach())
        if entry.x.dim() == 4 or math.prod(entry.extents) == entry.x.shape[1]:
            found.append(entry)

    handles = [
        module.register_forward_pre_hook(partial(record, name))
        for name, module in model.named_modules()
        if hasattr(module, "attention_weights")
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def looks(entries: Sequence[Recorded], pixels: Sequence[Pixel], image_size: int) -> list[AttentionMaps]:
    """Where each of the recorded modules looks from some pixels of the image.

    A pixel (row, column) of an image of side `image_size` is the query whose part of the map it lies in. Raises
    ValueError for a pixel outside the image.
    """
    for row, column in pixels:
        if not (0 <= row < image_size and 0 <= column < image_size):
            raise ValueError(f"pixels has {row},{column}, which lies outside the {image_size}x{image_size} image")
    return [_look(entry, pixels, image_size) for entry in entries]


@torch.no_grad()
def _look(entry: Recorded, pixels: Sequence[Pixel], image_size: int) -> AttentionMaps:
    height, width = entry.extents
    positions = tuple((row * height // image_size, column * width // image_size) for row, column in pixels)
    asked = positions if entry.x.dim() == 4 else [row * width + column for row, column in positions]
    weights = entry.module.attention_weights(entry.x, asked)[0].float().cpu()  # type: ignore[operator]
    weights = weights.reshape(*weights.shape[:2], height, width)
    return AttentionMaps(entry.name, weights, positions, groups_of_heads(entry.module, weights.shape[1]))


def last_of_each_size(maps: Sequence[AttentionMaps]) -> list[AttentionMaps]:
    """The last module on each size of map, in the order of the model."""
    by_size = {tuple(entry.weights.shape[2:]): entry for entry in maps}
    return list(by_size.values())


def plot(
    maps: Sequence[AttentionMaps],
    image: np.ndarray,
    pixels: Sequence[Pixel],
    path: Path,
    *,
    per_head: bool = False,
) -> None:
    """Draws `image` `(H, W, C)` (uint8) with its pixels, and for each pixel a row per module.

    A row has the mean over each group of heads, and with `per_head` each head. Every map is scaled by its own largest
    weight, which is printed above it; a circle marks the query.
    """
    columns = 1 + max(sum(b - a for _, a, b in m.groups) if per_head else len(m.groups) for m in maps)
    rows = len(pixels) * len(maps)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.35 * columns, 1.5 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, line in enumerate(axes):
        place, entry = row // len(maps), maps[row % len(maps)]
        first, *rest = line
        if row % len(maps) == 0:
            _draw_image(first, image, pixels[place])
        _label(first, entry)
        for axis, (title, weights) in zip(rest, _tiles(entry, place, per_head), strict=False):
            _draw_map(axis, weights, entry.positions[place], title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _tiles(entry: AttentionMaps, place: int, per_head: bool) -> Iterator[tuple[str, np.ndarray]]:
    for label, first, last in entry.groups:
        if per_head:
            for head in range(first, last):
                yield f"head {head}" + (f", {label}" if label else ""), entry.weights[place, head].numpy()
        else:
            yield label or "all heads", entry.weights[place, first:last].mean(0).numpy()


def _label(axis: Axes, entry: AttentionMaps) -> None:
    height, width = entry.weights.shape[2:]
    axis.text(
        -0.1,
        0.5,
        f"{height}x{width}\n{entry.name}",
        transform=axis.transAxes,
        rotation=90,
        ha="right",
        va="center",
        fontsize=5,
    )


def _draw_image(axis: Axes, image: np.ndarray, pixel: Pixel) -> None:
    grey = image.shape[-1] == 1
    axis.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=255)
    axis.plot(pixel[1], pixel[0], "o", markersize=6, markerfacecolor="none", markeredgecolor="red")
    axis.set_title(f"row {pixel[0]}, column {pixel[1]}", fontsize=6)


def _draw_map(axis: Axes, weights: np.ndarray, position: Pixel, title: str) -> None:
    axis.imshow(weights, cmap="viridis", vmin=0, interpolation="nearest")
    axis.plot(position[1], position[0], "o", markersize=4, markerfacecolor="none", markeredgecolor="red")
    axis.set_title(f"{title}\nup to {weights.max():.2g}", fontsize=6)
