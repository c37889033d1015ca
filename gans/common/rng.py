"""Random numbers that belong to images, not to processes.

In training, one batch can be worked on in parts: one after the other (gradient accumulation) or by several
processes at once. An image must get the same noise and the same augmentation however the batch is divided, or
else the division would change what is learned. `part` makes it so: it seeds torch's generators alike in every
part of a batch, and the functions here draw for the whole batch and return the rows of the part. Drawing too
much costs little: the numbers are a few per image or per token.

Models, augmentations and losses draw per-image numbers with `randn`, `rand` and `randint` of this module, first
axis images. A number for the whole batch comes from torch's functions as always. Outside of `part` the functions
are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Part(NamedTuple):
    batch: int
    start: int
    stop: int


class _Images(NamedTuple):
    generators: tuple[torch.Generator, ...]


# Not a context variable: on a GPU, checkpointed blocks are recomputed by a thread of the autograd engine.
_current: _Part | _Images | None = None


@contextmanager
def part(seed: int, batch: int, start: int, stop: int) -> Iterator[None]:
    """Inside, the functions of this module draw for images `start` to `stop` (excluded) of a batch.

    Seeds all of torch's generators with `seed` and leaves them wherever the draws have brought them.
    """
    global _current
    if not 0 <= start < stop <= batch:
        raise ValueError(f"start and stop are {start} and {stop}, which is no part of a batch of {batch}")
    before, _current = _current, _Part(batch, start, stop)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        _current = before


@contextmanager
def per_image(seeds: Sequence[int]) -> Iterator[None]:
    """Inside, the functions of this module draw for `len(seeds)` images, image i from a generator of its own.

    What image i gets depends on `seeds[i]` only, not on its neighbours or the device: the numbers are drawn on the
    CPU. They have nothing in common with those of `torch.Generator().manual_seed(seeds[i])`.
    """
    global _current
    scrambled = ((seed * 0x9E3779B97F4A7C15 + 1) % 2**63 for seed in seeds)
    before, _current = _current, _Images(tuple(torch.Generator().manual_seed(seed) for seed in scrambled))
    try:
        yield
    finally:
        _current = before


@contextmanager
def rewound(device: torch.device) -> Iterator[None]:
    """What is drawn inside, on the CPU and on `device`, is drawn again alike after it. Not for `per_image`."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        yield


def _draw(function: Callable[..., Tensor], shape: Sequence[int], **options: Any) -> Tensor:
    here = _current
    if here is None:
        return function(tuple(shape), **options)
    images = len(here.generators) if isinstance(here, _Images) else here.stop - here.start
    rows, *rest = shape
    if rows % images:
        raise RuntimeError(
            f"a draw of shape {tuple(shape)} in a part of {images} images: its first axis must be a multiple of "
            "their number; draw numbers that belong to no image with torch's own functions"
        )
    # Several rows an image come as repetitions of the batch, such as real images followed by generated ones.
    if isinstance(here, _Images):
        device = options.pop("device", None)
        each = [function((rows // images, *rest), generator=generator, **options) for generator in here.generators]
        return torch.stack(each, dim=1).reshape(tuple(shape)).to(device)
    whole = function((rows // images, here.batch, *rest), **options)
    return whole[:, here.start : here.stop].reshape(tuple(shape))


def randn(*shape: int, **options: Any) -> Tensor:
    """`torch.randn(*shape)`, first axis images; keyword arguments are torch's (`device`, `dtype`)."""
    return _draw(torch.randn, shape, **options)


def rand(*shape: int, **options: Any) -> Tensor:
    """`torch.rand(*shape)`, first axis images; keyword arguments are torch's (`device`, `dtype`)."""
    return _draw(torch.rand, shape, **options)


def randint(low: int, high: int, shape: Sequence[int], **options: Any) -> Tensor:
    """`torch.randint(low, high, shape)` (`high` excluded), first axis images; keyword arguments are torch's."""
    return _draw(lambda size, **kwargs: torch.randint(low, high, size, **kwargs), shape, **options)
