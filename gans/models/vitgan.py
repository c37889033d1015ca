"""ViTGAN: a vision transformer as generator and another as discriminator.

Source: "ViTGAN: Training GANs with Vision Transformers", Lee et al. 2021, arXiv 2107.04589. Written from the
description; the discriminator, which its authors never published, attends through `natten_ext`'s L2-distance attention,
so penalties differentiate a fused kernel twice. `docs/vitgan.md` says where the paper, the authors' later code
(a StyleGAN2 discriminator with ViTGAN's generator) and this file differ; each such place is an option below.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.models.augment import check_policy, diff_augment
from gans.models.conditioning import ClassScore
from gans.models.equalized import SpectralName, make_linear
from gans.models.layers import PatchTransformerConfig, learned_embedding
from gans.models.styles import StyleConfig, StyleGenerator
from gans.models.vitgan_layers import (
    ConvHead,
    ImplicitHead,
    MakeLinear,
    ScoreName,
    SelfModulatedNorm,
    SinusoidalPositions,
    ValuesName,
    ViTAttention,
    ViTMLP,
)


@dataclass(frozen=True)
class ViTGeneratorConfig(PatchTransformerConfig, StyleConfig):
    """ViTGAN's generator; the defaults are the paper's for CIFAR-10, where it says."""

    latent_dim: int = 384
    """Length of z ~ N(0, I) and of w. The authors' code: 384; not in the paper as far as we know it."""
    head: Literal["implicit", "conv"] = "implicit"
    """How tokens become pixels: the paper's Fourier features with weight modulation, or the convolutions that its
    authors recommend later for faster convergence."""
    implicit_dim: int = 384
    """Fourier features and hidden width of the implicit head."""
    score: ScoreName = "dot"
    """Attention scores; the authors' code has a form of "l2" in the generator too."""
    spectral: SpectralName = "none"
    """Spectral normalisation of the blocks; the authors' code has "improved"."""
    residual: Literal["input", "normed"] = "input"
    """What a block adds its branches to; the authors' code adds them to the normed input."""
    norm_eps: float = 1e-5
    """Added to the variance in norms; the authors' code has 1e-3."""

    def __post_init__(self) -> None:
        self._check_patches("generator")
        self._check_styles()
        if self.implicit_dim < 1:
            raise ValueError(f"generator.implicit_dim is {self.implicit_dim}; it must be at least 1")
        if self.head not in ("implicit", "conv"):
            raise ValueError(f"generator.head is {self.head!r}; it must be 'implicit' or 'conv'")
        if self.residual not in ("input", "normed"):
            raise ValueError(f"generator.residual is {self.residual!r}; it must be 'input' or 'normed'")
        if self.head == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"generator.patch_size is {self.patch_size}; the conv head needs a power of 2")

    @property
    def blocks(self) -> int:
        """The number of w that an image can be made of: one a transformer block, and one for the last norm and the
        head.
        """
        return self.depth + 1


@dataclass(frozen=True)
class ViTDiscriminatorConfig(PatchTransformerConfig):
    """ViTGAN's discriminator; the defaults are the paper's for CIFAR-10."""

    overlap: int | None = None
    """Pixels by which a patch reaches into its neighbours on each side; None is half of `patch_size` (paper)."""
    score: ScoreName = "l2"
    """Attention scores: minus the squared L2 distance (paper), or dot products (ViT)."""
    tied: bool = True
    """Whether query and key are one projection (paper)."""
    values: ValuesName = "projected"
    """Kim et al.'s "projected" values, without which L2 attention is not Lipschitz (docs/vitgan.md), or "plain" ones,
    as ViTGAN's formula is printed."""
    query_gain: float | None = None
    """Scale of queries and keys at initialisation (ours): None is head_dim ** -0.25 for "l2" and 1 for "dot"."""
    spectral: SpectralName = "improved"
    """Spectral normalisation of every linear map: "improved" (paper), "standard" or "none"."""
    equalized: bool = True
    """Equalised learning rate of every linear map (paper)."""
    augment: tuple[str, ...] = ("translation_0.125", "color", "cutout_1.0", "scaling")
    """DiffAug policy (paper; constants of DiffAug's paper), applied to whatever the discriminator is given."""
    augment_probability: float = 0.8
    """Probability of each augmentation for each image (paper)."""

    def __post_init__(self) -> None:
        self._check_patches("discriminator")
        if self.overlap is not None and not 0 <= self.overlap <= self.image_size:
            raise ValueError(f"discriminator.overlap is {self.overlap}; it must be in 0..{self.image_size}")
        if self.query_gain is not None and self.query_gain <= 0:
            raise ValueError(f"discriminator.query_gain is {self.query_gain}; it must be positive")
        if not 0 < self.augment_probability <= 1:
            raise ValueError(f"discriminator.augment_probability is {self.augment_probability}; it must be in (0, 1]")
        check_policy(self.augment)

    @property
    def reach(self) -> int:
        """`overlap`, resolved."""
        return self.patch_size // 2 if self.overlap is None else self.overlap


class GeneratorBlock(nn.Module):
    """`h = x + attn(norm1(x, w))`, then `h + mlp(norm2(h, w))`; x `(B, N, dim)`, w `(B, latent)`."""

    recompute = True  # under gradient checkpointing

    def __init__(self, config: ViTGeneratorConfig, linear: MakeLinear) -> None:
        super().__init__()
        dim = config.dim
        self.normed_residual = config.residual == "normed"
        self.norm1 = SelfModulatedNorm(dim, config.latent_dim, config.norm_eps)
        self.attn = ViTAttention(
            dim, config.heads, score=config.score, tied=config.score == "l2", values="plain", make_linear=linear
        )
        self.norm2 = SelfModulatedNorm(dim, config.latent_dim, config.norm_eps)
        self.mlp = ViTMLP(dim, config.mlp_ratio, make_linear=linear)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        for norm, branch in ((self.norm1, self.attn), (self.norm2, self.mlp)):
            normed = norm(x, w)
            x = (normed if self.normed_residual else x) + branch(normed)
        return x


class Generator(StyleGenerator):
    """z `(B, latent_dim)` to images `(B, channels, S, S)`, S = `config.image_size`; linear output, without tanh.

    The tokens start as sinusoidal positions alone; z comes in through w = mapping(z), which modulates every norm.
    """

    def __init__(self, config: ViTGeneratorConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.positions = SinusoidalPositions(config.side, dim)
        linear = partial(make_linear, spectral=config.spectral)
        self.blocks = nn.ModuleList(GeneratorBlock(config, linear) for _ in range(config.depth))
        self.norm = SelfModulatedNorm(dim, config.latent_dim, config.norm_eps)
        self.head: ImplicitHead | ConvHead = (
            ImplicitHead(dim, config.implicit_dim, config.patch_size, config.channels)
            if config.head == "implicit"
            else ConvHead(dim, config.latent_dim, config.side, config.image_size, config.channels)
        )

    def synthesize_blocks(self, styles: Tensor) -> Tensor:
        *of_blocks, last = styles.unbind(1)
        x = self.positions().expand(len(styles), -1, -1)
        for block, w in zip(self.blocks, of_blocks, strict=True):
            x = block(x, w)
        return self.head(self.norm(x, last), last)


class DiscriminatorBlock(nn.Module):
    """Pre-norm block of ViT, `h = x + attn(norm1(x))`, then `h + mlp(norm2(h))`; x `(B, N, dim)`."""

    recompute = True  # under gradient checkpointing

    def __init__(self, config: ViTDiscriminatorConfig, linear: MakeLinear) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = ViTAttention(
            config.dim,
            config.heads,
            score=config.score,
            tied=config.tied,
            values=config.values,
            query_gain=config.query_gain,
            make_linear=linear,
        )
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = ViTMLP(config.dim, config.mlp_ratio, make_linear=linear)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Discriminator(nn.Module):
    """Images `(B, channels, S, S)`, and labels `(B,)` if it has classes, to one unbounded score each, `(B,)`.

    DiffAug first, unless `augment` is False; overlapping patches, zero outside the image; a class token and learned
    positions; the blocks; the class token's normed value gives the score.
    """

    def __init__(self, config: ViTDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        linear = partial(make_linear, spectral=config.spectral, equalized=config.equalized)
        self.kernel = config.patch_size + 2 * config.reach
        self.patches = linear(config.channels * self.kernel**2, config.dim)
        self.cls_token = learned_embedding(1, 1, config.dim)
        self.pos_embed = learned_embedding(1, 1 + config.side**2, config.dim)
        self.blocks = nn.ModuleList(DiscriminatorBlock(config, linear) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = linear(config.dim, 1)
        self.class_score = ClassScore(config.classes, config.dim)

    def forward(self, images: Tensor, labels: Tensor | None = None, augment: bool = True) -> Tensor:
        config = self.config
        if augment:
            images = diff_augment(images, config.augment, config.augment_probability)
        weight = self.patches.effective_weight().unflatten(1, (config.channels, self.kernel, self.kernel))
        x = F.conv2d(images, weight, self.patches.effective_bias(), stride=config.patch_size, padding=config.reach)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        features = self.norm(x[:, 0])
        return self.head(features).squeeze(-1) + self.class_score(features, labels)
