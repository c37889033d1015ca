"""Images as files: grids, single images."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gans.common.files import new_file


def to_uint8(images: Tensor) -> np.ndarray:
    """Images `(N, C, H, W)` in [-1, 1] (clamped) as uint8 `(N, H, W, C)`."""
    scaled = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()


GAP = 2
"""Pixels between the images of a sample grid."""


def grid(images: Tensor, columns: int | None = None, gap: int = 0) -> Image.Image:
    """Images `(N, C, H, W)` side by side, row by row, with `gap` white pixels in between; about square unless `columns`
    is given.
    """
    tiles = to_uint8(images)
    count, height, width, channels = tiles.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    height, width = height + gap, width + gap
    canvas = np.full((rows * columns, height, width, channels), 255 if gap else 0, dtype=np.uint8)
    canvas[:count, : height - gap, : width - gap] = tiles
    canvas = canvas.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    canvas = canvas.reshape(rows * height, columns * width, channels)[: rows * height - gap, : columns * width - gap]
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def to_pil(image: Tensor) -> Image.Image:
    """One image `(C, H, W)` in [-1, 1] (clamped)."""
    return grid(image[None])


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    """The image with every pixel shown as a square of `scale` pixels."""
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_png(image: Image.Image, path: Path, scale: int = 1) -> None:
    """Writes a PNG, enlarged by whole pixels, which appears when it is complete; makes the folder."""
    with new_file(path) as partial:
        enlarge(image, scale).save(partial)


def data_uri(image: Image.Image) -> str:
    """The image itself as an address, for pages that need no other file."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
