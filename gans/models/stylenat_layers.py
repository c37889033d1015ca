"""Layers of StyleNAT: adaptive instance norm, the transformer block, the step to the next level, the way to RGB.

Maps are channels-last, `(B, H, W, C)`; w is `(B, latent)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.models.equalized import EqualizedLinear
from gans.models.layers import MLP, to_image, to_map
from natten_ext import GridAttention, NeighborhoodAttention

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageNetNormalization(nn.Module):
    """Between images in [-1, 1] and images with ImageNet's mean and deviation, `(B, 3, H, W)` both.

    StyleNAT's networks work on the latter; everything around them has the former.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Of values in [-1, 1], not [0, 1].
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 2 - 1, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1) * 2, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """From [-1, 1] to normalised."""
        return (images - self.mean) / self.std

    def inverse(self, images: Tensor) -> Tensor:
        """From normalised to [-1, 1]."""
        return images * self.std + self.mean


class AdaptiveInstanceNorm(nn.Module):
    """`gamma(w) * (x - mean) / deviation + beta(w)`, mean and deviation over the positions of each channel.

    Source: Huang & Belongie 2017, arXiv 1703.06868, equation 8. gamma and beta are one linear map of w whose bias
    starts at 0; there is no 1 beside gamma (as in the published code).
    """

    def __init__(self, dim: int, latent_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.style = EqualizedLinear(latent_dim, 2 * dim)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        gamma, beta = self.style(w)[:, None, None].chunk(2, dim=-1)
        variance, mean = torch.var_mean(x, dim=(1, 2), keepdim=True, correction=0)
        return gamma * ((x - mean) * torch.rsqrt(variance + self.eps)) + beta


class StyleBlock(nn.Module):
    """`x + attn(norm1(x, w))`, then `x + mlp(norm2(x, w))`, with the given attention over maps."""

    recompute = True  # under gradient checkpointing

    def __init__(
        self, dim: int, attn: GridAttention | NeighborhoodAttention, *, latent_dim: int, mlp_ratio: int
    ) -> None:
        super().__init__()
        self.norm1 = AdaptiveInstanceNorm(dim, latent_dim)
        self.attn = attn
        self.norm2 = AdaptiveInstanceNorm(dim, latent_dim)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x, w))
        return x + self.mlp(self.norm2(x, w))


def sinusoidal_table(length: int, dim: int) -> Tensor:
    """`(length, dim)`: sines, then cosines, of the positions 1 to `length` at `dim / 2` frequencies from 1 to 1/10000.

    Source: "Attention Is All You Need", arXiv 1706.03762, section 3.5, in the form of "Positional Encoding as Spatial
    Inductive Bias in GANs", Xu et al. 2021, arXiv 2012.05217, which StyleSwin and StyleNAT use.
    """
    frequencies = torch.exp(torch.arange(dim // 2) * (-math.log(10_000) / (dim // 2 - 1)))
    angles = torch.arange(1, length + 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class LevelUp(nn.Module):
    """To the next level: bilinear enlargement by 2, LayerNorm, Linear to its width, plus alpha times the positions.

    The positions are a fixed sinusoidal encoding, half of the channels for columns and half for rows; alpha starts
    at 0. `(B, S / 2, S / 2, dim)` to `(B, S, S, next_dim)`, S = `size`.
    """

    positions: Tensor

    def __init__(self, dim: int, next_dim: int, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reduction = nn.Linear(dim, next_dim, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.register_buffer("positions", sinusoidal_table(size, next_dim // 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = to_map(F.interpolate(to_image(x), scale_factor=2, mode="bilinear", align_corners=False))
        x = self.reduction(self.norm(x))
        size = len(self.positions)
        columns = self.positions[None].expand(size, -1, -1)
        rows = self.positions[:, None].expand(-1, size, -1)
        return x + self.alpha * torch.cat([columns, rows], dim=-1)


def fir_kernel(like: Tensor) -> Tensor:
    """The separable [1, 3, 3, 1] filter of StyleGAN2 (arXiv 1912.04958), `(4, 4)`, which sums to 1."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=like.device, dtype=like.dtype) / 8
    return torch.outer(taps, taps)


def fir_upsample(images: Tensor) -> Tensor:
    """Images `(B, C, H, W)` to `(B, C, 2 H, 2 W)`: zeros in between, then the FIR filter at gain 4."""
    channels = images.shape[1]
    kernel = (4 * fir_kernel(images)).expand(channels, 1, 4, 4)
    return F.conv_transpose2d(images, kernel, stride=2, padding=1, groups=channels)


def fir_blur(images: Tensor, padding: int, stride: int = 1) -> Tensor:
    """The FIR filter with zeros around `(B, C, H, W)`, at every `stride`-th position."""
    channels = images.shape[1]
    return F.conv2d(
        images, fir_kernel(images).expand(channels, 1, 4, 4), padding=padding, stride=stride, groups=channels
    )


class ToRGB(nn.Module):
    """1x1 convolution of a map to an image, added to the image so far (enlarged when it is smaller).

    Two biases, as published.
    """

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, channels, kernel_size=1)
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor, image: Tensor | None) -> Tensor:
        own = self.conv(to_image(x)) + self.bias
        if image is None:
            return own
        return own + (image if image.shape == own.shape else fir_upsample(image))
