"""Frozen networks that give features of images: maps, for a projected discriminator, or vectors, to measure over.

Both are `FeatureNetwork`s, known by the names in `gans.features.by_name`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

STRIDES = (4, 8, 16, 32)
"""Image side over map side of the four maps."""


class FeatureNetwork(nn.Module):
    """A frozen network: in evaluation mode whatever `train` says, and without gradients of its parameters once
    `gans.features.by_name` has made it; gradients go through to the images.
    """

    def train(self, mode: bool = True) -> FeatureNetwork:
        return super().train(False)


class MapNetwork(FeatureNetwork):
    """Four maps of each image, from fine to coarse. Subclasses set `channels` and define `forward`."""

    channels: tuple[int, int, int, int]
    """Channels of the four maps."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `(B, 3, S, S)` in [-1, 1] to maps `(B, channels[i], S / s, S / s)`, s in STRIDES; 32 divides S."""
        raise NotImplementedError


class VectorNetwork(FeatureNetwork):
    """One vector of each image. Distances over it are named after it: `frechet_judge` and `frechet_inception` have
    nothing to do with one another.

    Attributes: `name`; `num_features`; `about`, one line for people; `fingerprint`, which changes with whatever
    changes the features.
    """

    name: str
    num_features: int
    about: str
    fingerprint: str

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1], of any size, grey or colour, to features `(B, num_features)`, float32."""
        raise NotImplementedError


def resize(images: Tensor, size: int) -> Tensor:
    """Square images of side `size`, by antialiased bicubic interpolation, clamped to [-1, 1]."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images as colour ones, or colour ones as grey (ITU-R 601 luma, as Pillow has it)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
