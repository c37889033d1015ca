"""Attention as heat maps over the image that it made, and a table of them in HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jinja2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from gans.data.images import data_uri
from gans.evaluation.attention_maps import AttentionMaps

LEAST_SIDE = 128
"""Pixels along a side of a heat map, at the least."""
DIMMED = 0.45
"""What is left of the image's brightness under a heat map."""
MARK = (255, 60, 60)

TABLE = """<table class="looks">
{% for row in rows %}<tr><th>{{ row.size }}<br><small>{{ row.name }}</small></th>
{% for tile in row.tiles %}<td><img src="{{ tile.source }}" alt="{{ row.name }}, {{ tile.head }}"><br>
{{ tile.head }}<br><small>up to {{ tile.most }}</small></td>
{% endfor %}</tr>
{% endfor %}</table>"""


def heat_map(image: Image.Image, weights: Tensor, position: tuple[int, int]) -> Image.Image:
    """`weights` `(h, w)` over the image, dimmed and grey, with a frame around the query at `position` (row, column).

    The colour of a weight goes by its share of the largest one, and so does how much hides the image: where it is 0,
    there is nothing but the image. Each weight has a square of as many pixels.
    """
    height, width = weights.shape
    scale = math.ceil(LEAST_SIDE / max(height, width))
    shares = (weights / weights.max().clamp_min(1e-30)).numpy()
    colours = matplotlib.colormaps["viridis"](shares)[..., :3] * 255
    shares, colours = (values.repeat(scale, 0).repeat(scale, 1) for values in (shares[..., None], colours))
    below = image.convert("L").resize((width * scale, height * scale), Image.Resampling.BOX)
    grey = np.asarray(below, dtype=float)[..., None] * DIMMED
    picture = Image.fromarray((shares * colours + (1 - shares) * grey).round().astype(np.uint8))
    return framed(picture, position, scale)


def framed(picture: Image.Image, position: tuple[int, int], scale: int) -> Image.Image:
    """A copy with a frame around a square of `scale` pixels a side, the one in row and column `position`.

    It runs along the square's own edge; around a small one at some distance, to be seen and to hide nothing of it.
    """
    picture = picture.convert("RGB")
    row, column = position
    far = 0 if scale >= 8 else 3
    box = (column * scale - far, row * scale - far, (column + 1) * scale - 1 + far, (row + 1) * scale - 1 + far)
    ImageDraw.Draw(picture).rectangle(box, outline=MARK, width=max(1, scale // 8))
    return picture


def table(maps: Sequence[AttentionMaps], image: Image.Image) -> str:
    """HTML: a row for each module and a heat map for each of its heads, of the first pixel of `maps`."""
    rows = []
    for entry in maps:
        height, width = entry.weights.shape[2:]
        tiles = [
            {
                "source": data_uri(heat_map(image, entry.weights[0, head], entry.positions[0])),
                "head": f"head {head}" + (f", {label}" if label else ""),
                "most": f"{entry.weights[0, head].max():.2g}",
            }
            for label, first, last in entry.groups
            for head in range(first, last)
        ]
        rows.append({"name": entry.name, "size": f"{height}x{width}", "tiles": tiles})
    return jinja2.Environment(autoescape=True).from_string(TABLE).render(rows=rows)
