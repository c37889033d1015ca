"""Images for training: a folder, a ZIP file or the built-in digits, in an order that can be resumed exactly.

The order is a function of the seed alone: epoch e goes through a permutation drawn from (seed, e), and so do
its horizontal flips. A position in this endless stream is one integer, which is all that a checkpoint has to
store.

Resizing rule: the shorter side is brought to the wanted size with Pillow's bicubic filter (antialiased when
it shrinks), then the centre square is kept; images that already have the size are not touched.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
DIGITS = "digits"


@dataclass(frozen=True)
class DataConfig:
    """How images are read; their size and channels come from the models."""

    flip: bool = True
    """Mirror each image horizontally with probability 1/2."""
    workers: int = 0
    """Processes that decode ahead; 0 decodes in the training process. The order does not depend on it."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"data.workers is {self.workers}; it cannot be negative")


class ImageSource(Protocol):
    """A numbered collection of images."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image: ...


class FolderImages:
    """Every image file under a folder, however deep, in the order of their paths."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = sorted(
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if path.suffix.lower() in EXTENSIONS and path.is_file()
        )

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> Image.Image:
        name = self.names[index]
        try:
            return _decode((self.root / name).read_bytes())
        except Exception as error:
            raise ValueError(f"cannot read image {str(self.root / name)!r}: {error}") from error


class ZipImages:
    """Every image file in a ZIP archive, however deep, in the order of their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._owner = -1
        try:
            names = self._open_archive().namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"data {str(path)!r} is not a readable ZIP file: {error}") from error
        self.names = sorted(name for name in names if Path(name).suffix.lower() in EXTENSIONS)

    def __len__(self) -> int:
        return len(self.names)

    def _open_archive(self) -> zipfile.ZipFile:
        # One handle a process: forked workers would otherwise share a file offset.
        if self._archive is None or self._owner != os.getpid():
            self._archive = zipfile.ZipFile(self.path)
            self._owner = os.getpid()
        return self._archive

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None}

    def open(self, index: int) -> Image.Image:
        name = self.names[index]
        try:
            return _decode(self._open_archive().read(name))
        except Exception as error:
            raise ValueError(f"cannot read image {name!r} in {str(self.path)!r}: {error}") from error


class DigitImages:
    """The 1797 scanned 8x8 digits that come with scikit-learn (UCI "Optical Recognition of Handwritten Digits")."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        self.images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])


def _decode(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return ImageOps.exif_transpose(image)


def open_source(data: str | Path) -> ImageSource:
    """The images at `data`: a folder, a ZIP file, or the name "digits".

    Raises FileNotFoundError for a path that does not exist and ValueError for one without images.
    """
    if str(data) == DIGITS:
        return DigitImages()
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f"data {str(path)!r} does not exist; give a folder, a ZIP file or {DIGITS!r}")
    source: ImageSource = FolderImages(path) if path.is_dir() else ZipImages(path)
    if len(source) == 0:
        raise ValueError(
            f"data {str(path)!r} has no images; looked for files ending in {', '.join(sorted(EXTENSIONS))}"
        )
    return source


def flatten_onto_white(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB; transparent parts show white, 16-bit grey is brought to 8 bits."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def to_array(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """The image as uint8 `(channels, size, size)`, by the module's resizing rule."""
    image = flatten_onto_white(image).convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return images.to(torch.float32).div_(127.5).sub_(1)


class Stream(Dataset[Tensor]):
    """The endless shuffled sequence of images: item p is image `p % n` of epoch `p // n`, as uint8 `(C, S, S)`."""

    def __init__(
        self, source: ImageSource, *, size: int, channels: int, seed: int, flip: bool, shuffle: bool = True
    ) -> None:
        self.source = source
        self.size = size
        self.channels = channels
        self.seed = seed
        self.flip = flip
        self.shuffle = shuffle
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)
        self._flips = torch.empty(0, dtype=torch.bool)

    def _enter_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        count = len(self.source)
        # Any injective mix of the two numbers will do; a prime keeps neighbouring seeds apart.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self._order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        self._flips = torch.rand(count, generator=generator) < (0.5 if self.flip else 0.0)
        self._epoch = epoch

    def __getitem__(self, position: int) -> Tensor:
        epoch, place = divmod(position, len(self.source))
        self._enter_epoch(epoch)
        array = to_array(self.source.open(int(self._order[place])), self.size, self.channels)
        if self._flips[place]:
            array = array[:, :, ::-1]
        return torch.from_numpy(array.copy())


class _Positions:
    """Batches of consecutive positions, without end."""

    def __init__(self, start: int, batch_size: int) -> None:
        self.start = start
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Sequence[int]]:
        position = self.start
        while True:
            yield range(position, position + self.batch_size)
            position += self.batch_size


def batches(stream: Stream, batch_size: int, *, start: int = 0, workers: int = 0) -> Iterator[Tensor]:
    """Batches `(batch_size, C, S, S)` in [-1, 1] from position `start` on, without end; the global RNG is not
    touched.
    """
    loader = DataLoader(
        stream,
        batch_sampler=_Positions(start, batch_size),
        num_workers=workers,
        generator=torch.Generator(),
        multiprocessing_context="spawn" if workers else None,
    )
    for images in loader:
        yield to_unit_range(images)


def load_images(source: ImageSource, *, size: int, channels: int, limit: int, seed: int = 0) -> Tensor:
    """At most `limit` images of the source, `(N, C, S, S)` in [-1, 1]; the first of a shuffled order if it
    has more.
    """
    stream = Stream(source, size=size, channels=channels, seed=seed, flip=False, shuffle=len(source) > limit)
    return to_unit_range(torch.stack([stream[i] for i in range(min(limit, len(source)))]))
