"""StyleNAT's discriminator: convolutions over a pyramid of Haar wavelets, with spectral normalisation everywhere.

Source: StyleSwin, "Transformer-based GAN for High-resolution Image Generation", Zhang et al. 2021, arXiv 2112.10762,
section 3.5 (its wavelet discriminator is StyleNAT's), and facts read in the published code. Written from the
description. `docs/stylenat.md` says where that and this file differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.models.augment import check_policy, diff_augment
from gans.models.conditioning import ClassesConfig, ClassScore
from gans.models.spectral_norm import SpectralConv2d, SpectralDense
from gans.models.stylenat import Normalization, check_normalization
from gans.models.stylenat_layers import ImageNetNormalization, fir_blur

LAST_SIZE = 4
"""Side of the last map."""


@dataclass(frozen=True)
class StyleNATDiscriminatorConfig(ClassesConfig):
    """Discriminator; the defaults are the published FFHQ 256 px configuration (26.2 M parameters)."""

    scores_clean: ClassVar[bool] = True
    """Images are scored as they are unless `augment=True` is asked for."""

    image_size: int = 256
    """Side of the images, a power of 2 from 16 on."""
    channels: int = 3
    """Image channels, 1 or 3."""
    width: int = 32768
    """Channels times side of a map, up to `max_dim` channels. The first map has half the image's side and the channels
    of its whole side (published)."""
    max_dim: int = 512
    """Largest number of channels."""
    group: int = 4
    """Images over which the minibatch standard deviation is taken."""
    augment: tuple[str, ...] = ("flip", "translation_0.125", "color", "cutout_1.0")
    """DiffAug policy of the second view for balanced consistency (`bcr_against` "augmented" of the loss)."""
    normalization: Normalization = "imagenet"
    """What the network sees of images in [-1, 1]: ImageNet's mean and deviation (published), or no change ("none")."""

    def __post_init__(self) -> None:
        check_normalization("discriminator", self.normalization, self.channels)
        self._check_classes("discriminator")
        if self.image_size < 16 or self.image_size & (self.image_size - 1):
            raise ValueError(f"discriminator.image_size is {self.image_size}; it must be a power of 2 from 16 on")
        for name in ("max_dim", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"discriminator.{name} is {getattr(self, name)}; it must be at least 1")
        if self.width < self.image_size:
            raise ValueError(f"discriminator.width is {self.width}; it must be at least image_size {self.image_size}")
        check_policy(self.augment)

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of the map of each scale, from half the image's side to 4x4."""
        sizes = [self.image_size]  # of the first map, which has half this side
        while sizes[-1] > LAST_SIZE:
            sizes.append(sizes[0] // 4 if len(sizes) == 1 else sizes[-1] // 2)
        return tuple(min(self.max_dim, self.width // size) for size in sizes)


def haar_filters(like: Tensor) -> Tensor:
    """`(4, 2, 2)`: the orthonormal low-low, high-low, low-high and high-high filters (rows first) of 2x2 blocks."""
    low = torch.tensor([1.0, 1.0], device=like.device, dtype=like.dtype) / math.sqrt(2)
    high = torch.tensor([1.0, -1.0], device=like.device, dtype=like.dtype) / math.sqrt(2)
    return torch.stack([torch.outer(low, low), torch.outer(high, low), torch.outer(low, high), torch.outer(high, high)])


def haar(images: Tensor) -> Tensor:
    """Haar wavelet coefficients of `(B, C, H, W)`: `(B, 4 C, H / 2, W / 2)`, band by band, H and W even."""
    channels = images.shape[1]
    filters = haar_filters(images).repeat_interleave(channels, dim=0)[:, None]
    # A group of outputs per channel would interleave the bands: repeat the channels instead.
    return F.conv2d(images.repeat(1, 4, 1, 1), filters, stride=2, groups=4 * channels)


class BiasedLeaky(nn.Module):
    """Leaky ReLU with slope 0.2 of `x + bias`, times sqrt(2): StyleGAN2's activation, arXiv 1912.04958."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.view(-1, *[1] * (x.dim() - 2))
        return F.leaky_relu(x + bias, 0.2) * math.sqrt(2)


class Conv(nn.Module):
    """Convolution with spectral norm and activation; with `down`, FIR filter and stride 2."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, down: bool = False) -> None:
        super().__init__()
        self.down = down
        padding = 0 if down else kernel // 2
        self.conv = SpectralConv2d(in_channels, out_channels, kernel, 2 if down else 1, padding, bias=False)
        self.activation = BiasedLeaky(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(fir_blur(x, padding=2) if self.down else x))


class Scale(nn.Module):
    """One map size: wavelet coefficients join the features, then two 3x3 convolutions, the second to the next size."""

    recompute = True  # under gradient checkpointing

    def __init__(self, channels: int, dim: int, next_dim: int) -> None:
        super().__init__()
        self.from_rgb = Conv(4 * channels, dim, 1)
        self.conv1 = Conv(dim, dim, 3)
        self.conv2 = Conv(dim, next_dim, 3, down=True)

    def forward(self, x: Tensor | None, image: Tensor) -> Tensor:
        own = self.from_rgb(haar(image))
        return self.conv2(self.conv1(own if x is None else x + own))


def group_size(batch: int, group: int) -> int:
    """Images of a group: `group`, or the largest number below it that divides `batch`."""
    return next(size for size in range(min(group, batch), 0, -1) if batch % size == 0)


def minibatch_deviation(x: Tensor, group: int) -> Tensor:
    """Appends one channel to `(B, C, H, W)`: the mean standard deviation over groups of consecutive images.

    Source: ProGAN, arXiv 1710.10196, section 3, with StyleGAN2's groups (`group_size`).
    """
    size = group_size(len(x), group)
    deviation = torch.sqrt(x.unflatten(0, (-1, size)).var(1, correction=0) + 1e-8).mean(dim=(1, 2, 3))
    channel = deviation.repeat_interleave(size).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, channel], dim=1)


class Discriminator(nn.Module):
    """Images `(B, channels, S, S)` in [-1, 1], and labels `(B,)` if it has classes, to unbounded scores `(B,)`.

    Scores are those of the images as they are; with `augment=True`, of a view of them by the DiffAug policy, for
    balanced consistency.
    """

    def __init__(self, config: StyleNATDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        dims, channels = config.dims, config.channels
        self.normalization = ImageNetNormalization() if config.normalization == "imagenet" else None
        self.scales = nn.ModuleList(Scale(channels, dim, next_dim) for dim, next_dim in pairwise(dims))
        self.from_rgb = Conv(4 * channels, dims[-1], 1)
        self.last_conv = Conv(dims[-1] + 1, dims[-1], 3)
        self.last_linear = SpectralDense(LAST_SIZE**2 * dims[-1], dims[-1])
        self.last_activation = BiasedLeaky(dims[-1])
        self.head = SpectralDense(dims[-1], 1)
        self.class_score = ClassScore(config.classes, dims[-1])

    def scored_together(self, batch: int) -> int:
        """How many consecutive images have scores that depend on one another."""
        return group_size(batch, self.config.group)

    def forward(self, images: Tensor, labels: Tensor | None = None, augment: bool = False) -> Tensor:
        image = images if self.normalization is None else self.normalization(images)
        if augment:
            image = diff_augment(image, self.config.augment)
        x: Tensor | None = None
        for scale in self.scales:
            x = scale(x, image)
            image = fir_blur(image, padding=1, stride=2)
        assert x is not None
        x = minibatch_deviation(x + self.from_rgb(haar(image)), self.config.group)
        x = self.last_activation(self.last_linear(self.last_conv(x).flatten(1)))
        return self.head(x).squeeze(-1) + self.class_score(x, labels)
