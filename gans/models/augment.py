"""DiffAug: differentiable augmentation of real and generated images alike, inside the discriminator.

Source: "Differentiable Augmentation for Data-Efficient GAN Training", Zhao et al. 2020, arXiv 2006.10738. The
constants are those of TransGAN's published code, which differ from the paper's: translation by up to 0.2 of
the side (paper 0.125), cutout with probability 0.3 a batch (paper: always). The paper's are called
"translation_0.125" and "cutout_1.0"; Projected GAN's cutout (arXiv 2111.01007) is "cutout_ratio_0.2".

Every operation is affine in the image and differentiable twice, since the gradient penalty differentiates
through it. Numbers that belong to images come from `gans.common.rng`, those for a whole batch from torch's generator of
the CPU. Images are `(B, C, H, W)`, floating point, in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from gans.common import rng

Augmentation = Callable[[Tensor], Tensor]


def _uniform(x: Tensor, low: float, high: float) -> Tensor:
    """One number per image, shaped to broadcast over it."""
    return rng.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=x.dtype) * (high - low) + low


def _happens(x: Tensor, probability: float) -> Tensor:
    """One draw per image, shaped to broadcast over it."""
    return rng.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=x.dtype) < probability


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


def color(x: Tensor, probability: float = 1.0) -> Tensor:
    """Brightness, saturation and contrast, in this order; with a probability below 1, of each image by itself."""
    colored = contrast(saturation(brightness(x)))
    return colored if probability == 1 else torch.where(_happens(x, probability), colored, x)


def flip(x: Tensor, probability: float = 0.5) -> Tensor:
    """Mirrors each image from left to right with the given probability."""
    return torch.where(_happens(x, probability), x.flip(3), x)


def translation(x: Tensor, ratio: float = 0.2) -> Tensor:
    """Moves each image by whole pixels, up to `ratio` of each side either way; what comes in is 0."""
    batch, channels, height, width = x.shape

    def source(size: int) -> tuple[Tensor, Tensor]:
        reach = int(size * ratio + 0.5)
        shift = rng.randint(-reach, reach + 1, (batch, 1), device=x.device)
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
        first = rng.randint(0, size, (x.shape[0], 1), device=x.device) - side // 2
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

    Source: TransGAN's published code.
    """
    if not _chance(probability):
        return x
    height, width = (_randint(min(low, size), min(size // 2 + low, size)) for size in x.shape[2:])
    return erase(x, height, width)


def hue(x: Tensor, probability: float = 0.5) -> Tensor:
    """With the given probability, turns an image's colours about the grey axis by U(-pi, pi).

    Source: StyleGAN2-ADA, arXiv 2006.06676, appendix B, with TransGAN's probability. Leaves one channel alone.
    """
    if x.shape[1] == 1:
        return x
    angle = _uniform(x, -math.pi, math.pi) * _happens(x, probability)
    axis = torch.full((3,), 3**-0.5, device=x.device, dtype=x.dtype)
    cross = torch.linalg.cross(torch.eye(3, device=x.device, dtype=x.dtype), axis.expand(3, 3))
    along = torch.outer(axis, axis)
    cosine, sine = angle[:, 0].cos(), angle[:, 0].sin()  # (B, 1, 1)
    rotation = cosine * (torch.eye(3, device=x.device, dtype=x.dtype) - along) + along + sine * cross
    return (rotation @ x.flatten(2)).view_as(x)


def _band_filters() -> Tensor:
    """`(4, 43)`: filters for the four octaves of frequencies that add up to the identity, in float64.

    Source: StyleGAN2-ADA, arXiv 2006.06676, appendix B.
    """
    sym2 = torch.tensor(
        [-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025], dtype=torch.float64
    )

    def autocorrelation(filter_: Tensor) -> Tensor:
        return F.conv1d(filter_[None, None], filter_[None, None], padding=len(filter_) - 1)[0, 0] / 2

    low = autocorrelation(sym2)
    high = autocorrelation(sym2 * torch.tensor([1, -1, 1, -1]))
    bank = torch.zeros(4, 1, dtype=torch.float64)
    bank[0] = 1
    for band in range(1, 4):
        # Twice the resolution: zeros between the taps, interpolated by the low pass. The new highest octave is `high`.
        bank = torch.stack([bank, torch.zeros_like(bank)], dim=2).flatten(1)[:, :-1]
        bank = F.conv1d(bank[:, None], low[None, None], padding=len(low) - 1)[:, 0]
        middle = bank.shape[1] // 2
        bank[band, middle - len(high) // 2 : middle + len(high) // 2 + 1] += high
    return bank


BAND_FILTERS = _band_filters()


def band_filter(x: Tensor, probability: float = 0.25) -> Tensor:
    """Scales each of four octaves of frequencies by 2^N(0, 1), each with the given probability, at constant power.

    Source: StyleGAN2-ADA's image-space filtering, arXiv 2006.06676, appendix B, with TransGAN's probability.
    Images must be larger than 21 pixels, the filters' reach.
    """
    reach = BAND_FILTERS.shape[1] // 2
    if min(x.shape[2:]) <= reach:
        raise ValueError(f"augment 'filter' needs images larger than {reach} px, got {tuple(x.shape[2:])}")
    batch, channels, height, width = x.shape
    bands = len(BAND_FILTERS)
    power = torch.tensor([10.0, 1.0, 1.0, 1.0], device=x.device, dtype=x.dtype) / 13  # natural images: 1/f
    drawn = torch.exp2(rng.randn(batch, bands, device=x.device, dtype=x.dtype))
    happens = rng.rand(batch, bands, device=x.device, dtype=x.dtype) < probability
    gains = torch.diag_embed(torch.where(happens, drawn, 1) - 1) + 1  # one row per band, 1 elsewhere
    gains = (gains * torch.rsqrt((power * gains.square()).sum(2, keepdim=True))).prod(1)
    filters = (gains @ BAND_FILTERS.to(x)).repeat_interleave(channels, dim=0)
    y = F.pad(x, [reach] * 4, mode="reflect").reshape(1, batch * channels, height + 2 * reach, width + 2 * reach)
    y = F.conv2d(y, filters[:, None, None, :], groups=batch * channels)
    y = F.conv2d(y, filters[:, None, :, None], groups=batch * channels)
    return y.view_as(x)


def scaling(x: Tensor, deviation: float = 0.2) -> Tensor:
    """Enlarges each image about its centre by 2^N(0, deviation^2), bilinearly; what comes in is 0.

    ViTGAN names "scaling" without constants; the distribution is StyleGAN2-ADA's (arXiv 2006.06676, appendix B).
    """
    factor = torch.exp2(rng.randn(x.shape[0], 1, 1, device=x.device, dtype=x.dtype) * deviation)

    def weights(size: int) -> Tensor:
        """`(B, size, size)`: the share of each pixel (last axis) in each pixel of the result."""
        index = torch.arange(size, device=x.device, dtype=x.dtype)
        centre = (size - 1) / 2
        source = (index[:, None] - centre) / factor + centre
        return (1 - (source - index).abs()).clamp(min=0)

    rows, columns = weights(x.shape[2])[:, None], weights(x.shape[3])[:, None]
    return rows @ x @ columns.transpose(2, 3)


AUGMENTATIONS: dict[str, Augmentation] = {
    "translation": translation,
    "translation_0.125": partial(translation, ratio=0.125),
    "cutout": cutout,
    "cutout_1.0": partial(cutout, probability=1.0),
    "cutout_ratio_0.2": partial(cutout, ratio=0.2, probability=1.0),
    "color": color,
    "color_0.5": partial(color, probability=0.5),
    "flip": flip,
    "flip_0.4": partial(flip, probability=0.4),
    "erase_ratio": erase_ratio,
    "stl_erase_ratio": stl_erase_ratio,
    "filter": band_filter,
    "hue": hue,
    "scaling": scaling,
}


def check_policy(policy: Sequence[str]) -> None:
    """ValueError when `policy` names an augmentation that does not exist."""
    for name in policy:
        if name not in AUGMENTATIONS:
            raise ValueError(f"augment names {name!r}; it must be one of {', '.join(AUGMENTATIONS)}")


def diff_augment(x: Tensor, policy: Sequence[str], probability: float = 1.0) -> Tensor:
    """Applies the named augmentations in the given order with fresh draws; an empty policy returns `x`.

    With a probability below 1, each augmentation happens to each image with that probability (ViTGAN: 0.8); those
    that have a probability of their own keep it as well.
    """
    for name in policy:
        augmented = AUGMENTATIONS[name](x)
        x = augmented if probability == 1 else torch.where(_happens(x, probability), augmented, x)
    return x


def augment_alike(versions: Sequence[Tensor], policy: Sequence[str], probability: float = 1.0) -> list[Tensor]:
    """`diff_augment` of several versions of the same images, each with the same draws."""
    *others, last = versions
    augmented = []
    for version in others:
        with rng.rewound(version.device):
            augmented.append(diff_augment(version, policy, probability))
    return [*augmented, diff_augment(last, policy, probability)]
