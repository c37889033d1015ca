"""Generators in the style of StyleGAN: a mapping network makes w of z, and each block may get a w of its own.

Truncation, style mixing and path length regularisation need nothing else: whatever derives from `StyleGenerator` has
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.common import rng
from gans.models.conditioning import ClassesConfig, LatentAndClass, normalized
from gans.models.equalized import EqualizedLinear


@dataclass(frozen=True)
class StyleConfig(ClassesConfig):
    """What generators with a mapping network have in common."""

    has_mapping: ClassVar[bool] = True
    """The generator offers `map_latents` and `synthesize`."""

    latent_dim: int = 512
    """Length of z ~ N(0, I), and of w where a model has no length of its own for it."""
    mapping_depth: int = 8
    """Layers from z to w."""
    mapping_lr_multiplier: float = 0.01
    """Their learning rate over the others'."""
    style_mixing: float = 0.0
    """Probability, in training, that an image gets two z: one up to a random block, the other from there (StyleGAN:
    0.9)."""

    def _check_styles(self) -> None:
        """ValueError where one of these fields is out of range."""
        self._check_classes("generator")
        for name in ("latent_dim", "mapping_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"generator.{name} is {getattr(self, name)}; it must be at least 1")
        if self.mapping_lr_multiplier <= 0:
            raise ValueError(f"generator.mapping_lr_multiplier is {self.mapping_lr_multiplier}; it must be positive")
        if not 0 <= self.style_mixing <= 1:
            raise ValueError(f"generator.style_mixing is {self.style_mixing}; it must be in [0, 1]")

    @property
    def blocks(self) -> int:
        """The number of w that an image can be made of."""
        raise NotImplementedError

    @property
    def style_dim(self) -> int:
        """Length of w."""
        return self.latent_dim


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.2 that keeps the variance."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class Mapping(nn.Module):
    """z to w, both `(B, dim)`: z scaled to unit mean square, and the class beside it, then layers of Linear and leaky
    ReLU.

    Source: StyleGAN2, arXiv 1912.04958; depth and learning rate multiplier as ViTGAN's authors have them.
    """

    def __init__(self, dim: int, depth: int, lr_multiplier: float, classes: int = 0) -> None:
        super().__init__()
        self.latent = LatentAndClass(classes, dim)
        widths = [self.latent.width, *[dim] * depth]
        self.layers = nn.ModuleList(EqualizedLinear(a, b, lr_multiplier=lr_multiplier) for a, b in pairwise(widths))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        w = self.latent(normalized(z), labels)
        for layer in self.layers:
            w = leaky(layer(w))
        return w


class StyleGenerator(nn.Module):
    """z `(B, latent_dim)`, and labels `(B,)` if it has classes, to images `(B, channels, S, S)` by way of w; a subclass
    has `synthesize_blocks`.
    """

    MEAN_SAMPLES = 4096
    """Number of w whose mean truncation goes towards."""

    def __init__(self, config: StyleConfig) -> None:
        super().__init__()
        self.config = config
        self.mapping = self.make_mapping()

    def make_mapping(self) -> nn.Module:
        """z `(B, latent_dim)`, and labels `(B,)` or None, to w `(B, style_dim)`."""
        config = self.config
        return Mapping(config.latent_dim, config.mapping_depth, config.mapping_lr_multiplier, config.classes)

    def synthesize_blocks(self, styles: Tensor) -> Tensor:
        """Images of w `(B, blocks, style_dim)`."""
        raise NotImplementedError

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.synthesize(self.training_styles(z, labels))

    def training_styles(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """w of z, `(B, style_dim)`; in training mode, where style mixing is on, `(B, blocks, style_dim)`."""
        w = self.mapping(z, labels)
        return self._mix_at_random(w, labels) if self.training and self.config.style_mixing else w

    def map_latents(self, z: Tensor, labels: Tensor | None = None, *, truncation: float = 1.0) -> Tensor:
        """w `(B, style_dim)` of z; with a truncation psi below 1, `mean + psi * (w - mean)`.

        Source: the truncation trick in w, StyleGAN, arXiv 1812.04948, appendix B. The mean is that of `MEAN_SAMPLES`
        w of the weights at hand, always from the same z; with labels, of each image's class.
        """
        w = self.mapping(z, labels)
        return w if truncation == 1 else torch.lerp(self.mean_latent(labels), w, truncation)

    def mean_latent(self, labels: Tensor | None = None) -> Tensor:
        """The mean w, `(1, style_dim)`; with labels `(B,)` that of each one's class, `(B, style_dim)`."""
        fixed = torch.Generator().manual_seed(0)
        z = torch.randn(self.MEAN_SAMPLES, self.config.latent_dim, generator=fixed)
        z = z.to(next(self.mapping.parameters()))
        if labels is None:
            return self.mapping(z).mean(0, keepdim=True)
        known, places = labels.unique(return_inverse=True)
        return torch.stack([self.mapping(z, label.expand(len(z))).mean(0) for label in known])[places]

    def mix_styles(self, first: Tensor, second: Tensor, crossover: Tensor | int) -> Tensor:
        """w for every block, `(B, blocks, style_dim)`: `first` before block `crossover`, `second` from it on.

        Both are `(B, style_dim)` or of every block already; `crossover`, of each image or of all, counts blocks
        from 0. Source: style mixing, StyleGAN, arXiv 1812.04948, section 3.1.
        """
        blocks = torch.arange(self.config.blocks, device=first.device)
        crossover = torch.as_tensor(crossover, device=first.device).view(-1, 1, 1)
        return torch.where(blocks[:, None] < crossover, self._of_every_block(first), self._of_every_block(second))

    def synthesize(self, w: Tensor) -> Tensor:
        """Images of w, `(B, style_dim)` or `(B, blocks, style_dim)`; ValueError for another shape."""
        return self.synthesize_blocks(self._of_every_block(w))

    def _of_every_block(self, w: Tensor) -> Tensor:
        blocks, dim = self.config.blocks, self.config.style_dim
        if w.shape[1:] not in ((dim,), (blocks, dim)):
            raise ValueError(f"w must be (B, {dim}) or (B, {blocks}, {dim}), got {tuple(w.shape)}")
        return w if w.dim() == 3 else w[:, None].expand(-1, blocks, -1)

    def _mix_at_random(self, w: Tensor, labels: Tensor | None) -> Tensor:
        """With probability `style_mixing`, an image's w from a random block on becomes that of another z."""
        count, options = len(w), {"device": w.device}
        other = self.mapping(rng.randn(count, self.config.latent_dim, dtype=w.dtype, **options), labels)
        crossover = rng.randint(1, self.config.blocks, (count,), **options)
        mixed = rng.rand(count, **options) < self.config.style_mixing
        return self.mix_styles(w, other, torch.where(mixed, crossover, self.config.blocks))
