"""Bytes to images, within limits."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 2**26
"""The largest image that is decoded, 8192x8192; what follows takes up to 16 bytes a pixel, 1 GiB."""
MAX_BYTES = 8 * MAX_PIXELS
"""The largest file that is read: as large as that image can be without compression, at 16 bits a channel."""


class BrokenImageError(ValueError):
    """A file that is no readable image; the message has its name."""


def decode(read: Callable[[], bytes], called: str) -> Image.Image:
    """The image in the bytes that `read` returns, turned upright as its EXIF data say; BrokenImageError, which names it
    as `called`, if there is none.
    """
    try:
        image = Image.open(io.BytesIO(read()))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are decoded")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:  # Pillow's decoders raise all sorts
        what = "Pillow knows no such format" if isinstance(error, UnidentifiedImageError) else error
        raise BrokenImageError(f"cannot read image {called}: {what}") from error
