"""DiffAug: differentiable augmentation of real and generated images alike, inside the discriminator.

Source: "Differentiable Augmentation for Data-Efficient GAN Training", Zhao et al. 2020, arXiv 2006.10738. The
constants are those of TransGAN's published code, which differ from the paper's: translation by up to 0.2 of
the side (paper 0.125), cutout with probability 0.3 a batch (paper: always).

Every operation is (piecewise) linear in the image and differentiable twice, since the gradient penalty
differentiates through it. All draws come from torch's global generator of the image's device (host-side
choices from the CPU's), so saving the generators' states makes a resumed run repeat them exactly. Images are
`(B, C, H, W)`, floating point, in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Augmentation = Callable[[Tensor], Tensor]


def _uniform(x: Tensor, low: float, high: float) -> Tensor:
    """One number per image, shaped to broadcast over it."""
    return torch.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=x.dtype) * (high - low) + low


def _chance(probability: float) -> bool:
    """One draw for the whole batch, on the CPU's generator (no synchronisation with a GPU)."""
    return bool(torch.rand(()) < probability)


def _randint(low: int, high: int) -> int:
    """One integer of low..high, both included, for the whole batch."""
    return int(torch.randint(low, high + 1, ()))


def brightness(x: Tensor, strength: float = 0.5) -> Tensor:
    """Adds U(-strength, strength) to each image."""
    return x + _uniform(x, -strength, strength)


def saturation(x: Tensor, low: float = 0.0, high: float = 2.0) -> Tensor:
    """Scales each pixel's distance to its own grey by U(low, high); does nothing to one channel."""
    grey = x.mean(dim=1, keepdim=True)
    return (x - grey) * _uniform(x, low, high) + grey


def contrast(x: Tensor, low: float = 0.5, high: float = 1.5) -> Tensor:
    """Scales the distance to the image's mean by U(low, high)."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * _uniform(x, low, high) + mean


def color(x: Tensor) -> Tensor:
    """Brightness, saturation and contrast, in this order."""
    return contrast(saturation(brightness(x)))


def translation(x: Tensor, ratio: float = 0.2) -> Tensor:
    """Moves each image by whole pixels, up to `ratio` of each side either way; what comes in is 0."""
    batch, channels, height, width = x.shape

    def source(size: int) -> tuple[Tensor, Tensor]:
        reach = int(size * ratio + 0.5)
        shift = torch.randint(-reach, reach + 1, (batch, 1), device=x.device)
        index = torch.arange(size, device=x.device) - shift
        return index.clamp(0, size - 1), (index >= 0) & (index < size)

    (rows, row_inside), (columns, column_inside) = source(height), source(width)
    index = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, height * width)
    inside = row_inside[:, :, None] & column_inside[:, None, :]
    moved = x.flatten(2).gather(2, index.expand(-1, channels, -1)).view_as(x)
    return moved * inside[:, None].to(x.dtype)


def erase(x: Tensor, height: int, width: int) -> Tensor:
    """Zeroes one `height` x `width` box per image, centred on any of its pixels and cut off at the border."""

    def covered(size: int, side: int) -> Tensor:
        first = torch.randint(0, size, (x.shape[0], 1), device=x.device) - side // 2
        index = torch.arange(size, device=x.device)
        return (index >= first) & (index < first + side)

    box = covered(x.shape[2], height)[:, :, None] & covered(x.shape[3], width)[:, None, :]
    return x * (~box)[:, None].to(x.dtype)


def cutout(x: Tensor, ratio: float = 0.5, probability: float = 0.3) -> Tensor:
    """With the given probability per batch, erases a box of `ratio` of each side from every image."""
    if not _chance(probability):
        return x
    return erase(x, int(x.shape[2] * ratio + 0.5), int(x.shape[3] * ratio + 0.5))


def erase_ratio(x: Tensor, low: float = 0.2, high: float = 0.7, probability: float = 0.3) -> Tensor:
    """Cutout with sides U(low, high) of the image's, drawn once a batch."""
    if not _chance(probability):
        return x
    height, width = (_randint(int(size * low), int(size * high)) for size in x.shape[2:])
    return erase(x, height, width)


def stl_erase_ratio(x: Tensor, low: int = 20, probability: float = 0.3) -> Tensor:
    """Cutout with sides of 20 to H/2 + 20 pixels (44 at STL-10's 48), drawn once a batch.

    The sides are the published code's; the probability is taken to be `erase_ratio`'s.
    """
    if not _chance(probability):
        return x
    height, width = (_randint(min(low, size), min(size // 2 + low, size)) for size in x.shape[2:])
    return erase(x, height, width)


AUGMENTATIONS: dict[str, Augmentation] = {
    "translation": translation,
    "cutout": cutout,
    "color": color,
    "erase_ratio": erase_ratio,
    "stl_erase_ratio": stl_erase_ratio,
}


def check_policy(policy: Sequence[str]) -> None:
    """ValueError when `policy` names an augmentation that does not exist."""
    for name in policy:
        if name not in AUGMENTATIONS:
            raise ValueError(f"augment names {name!r}; it must be one of {', '.join(AUGMENTATIONS)}")


def diff_augment(x: Tensor, policy: Sequence[str]) -> Tensor:
    """Applies the named augmentations in the given order with fresh draws; an empty policy returns `x`."""
    for name in policy:
        x = AUGMENTATIONS[name](x)
    return x
