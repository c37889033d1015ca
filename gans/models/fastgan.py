"""FastGAN's generator: convolutions with gated shortcuts from small maps to large ones.

Source: "Towards Faster and Stabilized GAN Training for High-fidelity Few-shot Image Synthesis", Liu et al. 2021, arXiv
2101.04775, as the code of "Projected GANs Converge Faster" (arXiv 2111.01007) has it. Written from the description.
Published for 256 to 1024 px; below, it is the same rule with fewer levels, and a `skip_ratio` to go with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.common import rng
from gans.models.conditioning import ClassesConfig, LatentAndClass, normalized
from gans.models.spectral_norm import SpectralConv2d, SpectralConvTranspose2d

FIRST_SIZE = 4
"""Side of the first map."""

MULTIPLIERS = {4: 16, 8: 8, 16: 4, 32: 2, 64: 2, 128: 1, 256: 0.5, 512: 0.25, 1024: 0.125}
"""Channels of each map size over `width`."""


@dataclass(frozen=True)
class FastGANGeneratorConfig(ClassesConfig):
    """FastGAN's generator; the defaults are Projected GAN's at 256 px."""

    latent_dim: int = 256
    """Length of z ~ N(0, I), which is scaled to unit mean square."""
    image_size: int = 256
    """Side of the images, a power of 2 from 32 to 1024 (published: from 256)."""
    channels: int = 3
    """Image channels, 1 or 3."""
    width: int = 128
    """Channels of the 128 px map; the others follow from it."""
    lite: bool = False
    """One convolution a level, without noise, instead of two (published as `fastgan_lite`, for small sets)."""
    skip_ratio: int = 16
    """Side of the map that a gate scales over the side of the map that it is made of; 0 for no gates. Below 64 px no
    map is 16 times another."""

    def __post_init__(self) -> None:
        self._check_classes("generator")
        if self.channels not in (1, 3):
            raise ValueError(f"generator.channels is {self.channels}; it must be 1 or 3")
        if self.image_size not in MULTIPLIERS or self.image_size < 32:
            raise ValueError(f"generator.image_size is {self.image_size}; it must be a power of 2 from 32 to 1024")
        if self.latent_dim < 1:
            raise ValueError(f"generator.latent_dim is {self.latent_dim}; it must be positive")
        if self.width < 8 or self.width % 8:
            raise ValueError(f"generator.width is {self.width}; it must be a positive multiple of 8")
        if self.skip_ratio < 0 or self.skip_ratio == 1 or self.skip_ratio & (self.skip_ratio - 1):
            raise ValueError(f"generator.skip_ratio is {self.skip_ratio}; it must be 0 or a power of 2 from 2 on")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each map, from 4 to the image's."""
        return tuple(size for size in MULTIPLIERS if size <= self.image_size)

    def dim(self, size: int) -> int:
        """Channels of the map of this side."""
        return int(MULTIPLIERS[size] * self.width)

    @property
    def gates(self) -> dict[int, int]:
        """For each map that is gated, the map that its gate is made of, by their sides; none at 1024 px (published)."""
        if not self.skip_ratio:
            return {}
        pairs = {size: size // self.skip_ratio for size in self.sizes if size <= 512}
        return {large: small for large, small in pairs.items() if small >= FIRST_SIZE}


class PixelNoise(nn.Module):
    """Adds one Gaussian number per pixel to all channels, times a learned strength that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        return x + self.strength * rng.randn(batch, 1, height, width, device=x.device, dtype=x.dtype)


def _gated_conv(dim: int, next_dim: int, *, noise: bool) -> nn.Sequential:
    """3x3 convolution, noise, BatchNorm and gated linear unit."""
    conv = SpectralConv2d(dim, 2 * next_dim, 3, 1, 1, bias=False)
    return nn.Sequential(conv, *([PixelNoise()] if noise else []), nn.BatchNorm2d(2 * next_dim), nn.GLU(1))


class UpBlock(nn.Sequential):
    """To twice the side: nearest neighbours, then one (`lite`) or two gated convolutions."""

    def __init__(self, dim: int, next_dim: int, *, lite: bool) -> None:
        convs = [_gated_conv(dim, next_dim, noise=not lite)]
        if not lite:
            convs.append(_gated_conv(next_dim, next_dim, noise=True))
        super().__init__(nn.Upsample(scale_factor=2, mode="nearest"), *convs)


class Gate(nn.Module):
    """Skip-layer excitation (arXiv 2101.04775, section 3.1): a map times a gate per channel, made of a smaller map."""

    def __init__(self, small_dim: int, large_dim: int) -> None:
        super().__init__()
        self.squeeze = SpectralConv2d(small_dim, large_dim, 4, bias=False)
        self.excite = SpectralConv2d(large_dim, large_dim, 1, bias=False)

    def forward(self, small: Tensor, large: Tensor) -> Tensor:
        gate = F.silu(self.squeeze(F.adaptive_avg_pool2d(small, 4)))
        return large * torch.sigmoid(self.excite(gate))


class Generator(nn.Module):
    """z `(B, latent_dim)`, and labels `(B,)` if it has classes, to images `(B, channels, S, S)`, S = `image_size`;
    linear output, without tanh.

    Every convolution has spectral normalisation.
    """

    def __init__(self, config: FastGANGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        first = 2 * config.dim(FIRST_SIZE)
        self.latent = LatentAndClass(config.classes, config.latent_dim)
        self.input = nn.Sequential(
            SpectralConvTranspose2d(self.latent.width, first, FIRST_SIZE, bias=False), nn.BatchNorm2d(first), nn.GLU(1)
        )
        self.blocks = nn.ModuleDict(
            {
                str(size): UpBlock(config.dim(size // 2), config.dim(size), lite=config.lite)
                for size in config.sizes
                if size > FIRST_SIZE
            }
        )
        self.gates = nn.ModuleDict(
            {str(large): Gate(config.dim(small), config.dim(large)) for large, small in config.gates.items()}
        )
        self.to_rgb = SpectralConv2d(config.dim(config.image_size), config.channels, 3, 1, 1)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        z = self.latent(normalized(z), labels)
        x = self.input(z[:, :, None, None])
        maps = {FIRST_SIZE: x}
        for name, block in self.blocks.items():
            size, x = int(name), block(x)
            if name in self.gates:
                x = self.gates[name](maps[self.config.gates[size]], x)
            maps[size] = x
        return self.to_rgb(x)
