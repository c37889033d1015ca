"""The projected discriminator: four small discriminators over the mixed features of a frozen network.

Source: "Projected GANs Converge Faster", Sauer et al. 2021, arXiv 2111.01007, and facts read in the authors' published
code. Written from the description. It goes with every generator of the package. `docs/projected.md` says where the
paper, the published code and this file differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.features.by_name import check_maps, make_maps
from gans.features.network import STRIDES
from gans.models.augment import check_policy, diff_augment
from gans.models.conditioning import ClassesConfig, check_labels, normalized
from gans.models.spectral_norm import SpectralConv2d

MIXED = (64, 128, 256, 512)
"""Channels of the four maps after cross-channel mixing, from fine to coarse."""

HALVINGS = 4
"""Halvings of the finest map; each coarser one has one less."""

CLASS_DIM = 64
"""Numbers that are compared with a vector of the class for every logit (published)."""

WIDEST_PIXELS = 512
"""Channels beyond which the discriminator on pixels does not double them."""


@dataclass(frozen=True)
class ProjectedDiscriminatorConfig(ClassesConfig):
    """Projected discriminator; the defaults are the published configuration, with the paper's Lite1."""

    image_size: int = 256
    """Side of the images."""
    channels: int = 3
    """Image channels, 1 or 3; the feature network sees grey as colour."""
    features: str = "lite1"
    """Feature network: "lite1" (EfficientNet-Lite1, ImageNet), "random", "timm:NAME", or one that was registered."""
    feature_size: int = 224
    """Smaller images are enlarged to this side for the feature network (published: 224); a multiple of 32."""
    width: int = 64
    """Channels of a discriminator after the first of its four halvings; they double with each (published: 64)."""
    augment: tuple[str, ...] = ("color", "translation_0.125", "cutout_ratio_0.2")
    """DiffAug policy, before the features."""
    pixel_width: int = 0
    """Channels of a second discriminator that looks at the pixels themselves, 0 for none. Beside the projected ones it
    holds against what the feature network does not see, and against its leaking into measures made with it."""

    def __post_init__(self) -> None:
        self._check_classes("discriminator")
        if self.channels not in (1, 3):
            raise ValueError(f"discriminator.channels is {self.channels}; it must be 1 or 3")
        if self.image_size < 8:
            raise ValueError(f"discriminator.image_size is {self.image_size}; it must be at least 8")
        if self.feature_size < 128 or self.feature_size % STRIDES[-1]:
            raise ValueError(
                f"discriminator.feature_size is {self.feature_size}; it must be a multiple of 32, at least 128"
            )
        if self.image_size > self.feature_size and self.image_size % STRIDES[-1]:
            raise ValueError(
                f"discriminator.image_size is {self.image_size}; images beyond feature_size ({self.feature_size}) are "
                "not resized and must be a multiple of 32"
            )
        if self.width < 1:
            raise ValueError(f"discriminator.width is {self.width}; it must be at least 1")
        if self.pixel_width < 0:
            raise ValueError(f"discriminator.pixel_width is {self.pixel_width}; it cannot be negative")
        check_maps(self.features)
        check_policy(self.augment)


class Projection(nn.Module):
    """Cross-channel and cross-scale mixing (paper, section 3.2): fixed random 1x1 convolutions, from coarse to fine.

    Each map gets `MIXED` channels; then, from the coarsest on, what the coarser gave is added, the sum is enlarged by
    2 (bilinearly, corners aligned) and mixed by a second 1x1 convolution, to half the channels (the finest keeps its).
    Weights are PyTorch's initial ones, as published. `(B, C_i, S / s, S / s)`, s in 4, 8, 16, 32, to maps of twice the
    side with 64, 64, 128 and 256 channels.
    """

    channels = (MIXED[0], *(width // 2 for width in MIXED[1:]))
    """Channels of the four results."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.across_channels = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(channels, MIXED, strict=True))
        self.across_scales = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(MIXED, self.channels, strict=True))
        self.requires_grad_(False)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        results: list[Tensor] = []
        for x, mix, fuse in reversed(list(zip(maps, self.across_channels, self.across_scales, strict=True))):
            x = mix(x)
            if results:
                x = x + results[-1]
            # A 1x1 convolution and the enlargement commute; in this order it works on a quarter of the positions.
            results.append(F.interpolate(fuse(x), scale_factor=2, mode="bilinear", align_corners=True))
        return results[::-1]


def _down(dim: int, next_dim: int) -> nn.Sequential:
    """4x4 convolution of stride 2, BatchNorm and leaky ReLU."""
    return nn.Sequential(SpectralConv2d(dim, next_dim, 4, 2, 1), nn.BatchNorm2d(next_dim), nn.LeakyReLU(0.2))


def _scores(dims: list[int], outputs: int) -> nn.Sequential:
    """Maps `(B, dims[0], S, S)` to logits `(B, outputs, s, s)`, one step to half the side for each further number."""
    downs = (_down(dim, next_dim) for dim, next_dim in pairwise(dims))
    return nn.Sequential(*downs, SpectralConv2d(dims[-1], outputs, 4, bias=False))


class Discriminator(nn.Module):
    """Images `(B, channels, S, S)` in [-1, 1] to several unbounded logits each, `(B, logits)`.

    DiffAug (unless `augment` is False), enlargement, frozen features, projection; then one discriminator a scale. At
    224 px each has 4x4 logits, 64 in all. A pixel discriminator's logits follow them. A loss takes its mean over all.

    With classes it takes labels `(B,)`, and every logit is the product of `CLASS_DIM` numbers with a learned vector of
    the class, of which each discriminator has its own (as published, but for a layer between class and vector).
    """

    def __init__(self, config: ProjectedDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.features = make_maps(config.features)
        self.projection = Projection(self.features.channels)
        outputs = CLASS_DIM if config.classes else 1
        self.discriminators = nn.ModuleList(
            _scores([dim, *(config.width * 2**i for i in range(scale, HALVINGS))], outputs)
            for scale, dim in enumerate(self.projection.channels)
        )
        self.pixels = _pixel_discriminator(config, outputs) if config.pixel_width else None
        count = len(self.discriminators) + bool(config.pixel_width) if config.classes else 0
        self.class_vectors = nn.ModuleList(nn.Embedding(config.classes, CLASS_DIM) for _ in range(count))

    def scored_together(self, batch: int) -> int:
        """How many consecutive images have scores that depend on one another: all, by the batch norms."""
        return batch

    def forward(self, images: Tensor, labels: Tensor | None = None, augment: bool = True) -> Tensor:
        config = self.config
        check_labels(config.classes, labels)
        if augment:
            images = diff_augment(images, config.augment)
        x = images.expand(-1, 3, -1, -1) if config.channels == 1 else images
        if x.shape[-1] < config.feature_size:
            size = (config.feature_size, config.feature_size)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # depthwise and 1x1 convolutions are faster so
        maps = self.projection(self.features(x))
        # The discriminators' 4x4 convolutions of stride 2 are not.
        logits = [scores(x.contiguous()).flatten(2) for scores, x in zip(self.discriminators, maps, strict=True)]
        if self.pixels is not None:
            logits.append(self.pixels(images).flatten(2))
        for i, embedding in enumerate(self.class_vectors):
            vectors = normalized(embedding(labels)) * CLASS_DIM**-0.5
            logits[i] = (logits[i] * vectors[:, :, None]).sum(1, keepdim=True)
        return torch.cat(logits, dim=2).squeeze(1)


def _pixel_discriminator(config: ProjectedDiscriminatorConfig, outputs: int) -> nn.Sequential:
    """3x3 convolution and leaky ReLU, then halvings to 8 px or just below, doubling the channels up to a limit."""
    dims, size = [config.pixel_width], config.image_size
    while size > 8:
        dims.append(min(2 * dims[-1], max(WIDEST_PIXELS, config.pixel_width)))
        size //= 2
    first = SpectralConv2d(config.channels, dims[0], 3, 1, 1, bias=False)
    return nn.Sequential(first, nn.LeakyReLU(0.2), _scores(dims, outputs))
