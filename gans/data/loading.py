"""Images for training, in an order that can be resumed exactly.

The order is a function of the seed alone: epoch e goes through a permutation drawn from (seed, e), and so do
its horizontal flips. A position in this endless stream is one integer, which is all that a checkpoint has to
store.

Resizing rule: the shorter side is brought to the wanted size with Pillow's bicubic filter (antialiased when
it shrinks), then the centre square is kept; images that already have the size are not touched. Transparency becomes
white.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gans.data.decoding import BrokenImageError
from gans.data.sources import ImageSource

Broken = Literal["refuse", "skip"]


@dataclass(frozen=True)
class DataConfig:
    """How images are read; their size and channels come from the models."""

    flip: bool = True
    """Mirror each image horizontally with probability 1/2."""
    split: str = "train"
    """Which split of the data to use, where it has several."""
    broken: Broken = "refuse"
    """Stop at a file that cannot be read, or take the next image in the order ("skip"); either way it is named."""
    workers: int = 0
    """Processes that decode ahead; 0 decodes in the training process. The order does not depend on it."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"images.workers is {self.workers}; it cannot be negative")
        if self.broken not in ("refuse", "skip"):
            raise ValueError(f"images.broken is {self.broken!r}; it must be 'refuse' or 'skip'")


def flatten_onto_white(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB; transparent parts show white, 16-bit grey is brought to 8 bits."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")  # convert copies
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def to_array(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """The image as uint8 `(channels, size, size)`, by the module's resizing rule."""
    image, mode = flatten_onto_white(image), "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return images.to(torch.float32).div_(127.5).sub_(1)


class Stream(Dataset[Any]):
    """The endless shuffled sequence of images: item p is image `p % n` of epoch `p // n`, as uint8 `(C, S, S)`.

    With `labels`, of every image of the source, an item is a pair: the image and its label.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        size: int,
        channels: int,
        seed: int,
        flip: bool,
        shuffle: bool = True,
        broken: Broken = "refuse",
        labels: Sequence[int] | None = None,
    ) -> None:
        self.source = source
        self.labels = labels
        self.size = size
        self.channels = channels
        self.seed = seed
        self.flip = flip
        self.shuffle = shuffle
        self.broken = broken
        self._unreadable: set[int] = set()
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

    def __getitem__(self, position: int) -> Any:
        epoch, place = divmod(position, len(self.source))
        self._enter_epoch(epoch)
        array, index = self._read(place)
        if self._flips[place]:
            array = array[:, :, ::-1]
        image = torch.from_numpy(array.copy())
        return image if self.labels is None else (image, self.labels[index])

    def _read(self, place: int) -> tuple[np.ndarray, int]:
        """The image at a place of the epoch's order, or the next one that is readable, with its number."""
        for candidate in itertools.chain(range(place, len(self.source)), range(place)):
            index = int(self._order[candidate])
            if index in self._unreadable:
                continue
            try:
                return to_array(self.source.open(index), self.size, self.channels), index
            except BrokenImageError as error:
                if self.broken == "refuse":
                    raise
                print(f"skipped: {error}", file=sys.stderr)
                self._unreadable.add(index)
        raise BrokenImageError(f"none of the {len(self.source)} images can be read")


class _Positions:
    """Batches of consecutive positions, without end, their sizes in turn those of `sizes`; rows of one process."""

    def __init__(self, start: int, sizes: Sequence[int], rank: int, processes: int) -> None:
        self.start = start
        self.sizes = sizes
        self.rank = rank
        self.processes = processes

    def __iter__(self) -> Iterator[Sequence[int]]:
        position = self.start
        for size in itertools.cycle(self.sizes):
            share = size // self.processes
            yield range(position + self.rank * share, position + (self.rank + 1) * share)
            position += size


def _leave_group(worker: int) -> None:
    # Ctrl-C and the like reach a whole group of processes. The main one then finishes its step, with this one's images.
    os.setpgrp()


def batches(
    stream: Stream,
    sizes: int | Sequence[int],
    *,
    start: int = 0,
    workers: int = 0,
    rank: int = 0,
    processes: int = 1,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Batches `(size, C, S, S)` of uint8 from position `start` on, without end; the global RNG is not touched. Of a
    stream with labels, pairs of such a batch and its labels `(size,)`.

    `sizes` are taken in turn. Of several processes, number `rank` gets its share of each batch, in order.
    """
    loader = DataLoader(
        stream,
        batch_sampler=_Positions(start, [sizes] if isinstance(sizes, int) else sizes, rank, processes),
        num_workers=workers,
        generator=torch.Generator(),
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_leave_group if workers else None,
        pin_memory=pin_memory,
    )
    yield from loader


def load_images(
    source: ImageSource, *, size: int, channels: int, limit: int, seed: int = 0, broken: Broken = "refuse"
) -> Tensor:
    """At most `limit` images of the source, `(N, C, S, S)` in [-1, 1]; the first of a shuffled order if it
    has more.
    """
    shuffle = len(source) > limit
    stream = Stream(source, size=size, channels=channels, seed=seed, flip=False, shuffle=shuffle, broken=broken)
    return to_unit_range(torch.stack([stream[i] for i in range(min(limit, len(source)))]))
