"""GAT: plain vision transformers as generator and discriminator, with outputs at several depths.

Source: "Scalable GANs with Transformers", Hyun et al. 2025, arXiv 2509.24935, and facts read in the authors' published
code. Written from the description. Theirs work on the latents of a VAE, 32x32 with 4 channels; these on pixels.
`docs/gat.md` says where the paper, the published code and this file differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.models.augment import augment_alike, check_policy
from gans.models.conditioning import LatentAndClass, check_labels, normalized
from gans.models.equalized import EqualizedLinear
from gans.models.gat_layers import EPS, GatedMLP, RotaryAttention, init_linears, perturb, sincos_positions
from gans.models.layers import PatchTransformerConfig, learned_embedding
from gans.models.styles import StyleConfig, StyleGenerator

CLASS_LR_MULTIPLIER = 0.01
"""Learning rate of the layers between a class and its vector in the discriminator, over the others' (published)."""

MODULATION_GAIN = 0.1
"""Gain of the initial weights from w to scales and gates (published)."""


@dataclass(frozen=True)
class _Sizes(PatchTransformerConfig):
    """What both networks have in common; the defaults are those of GAT-S/2."""

    patch_size: int = 2
    depth: int = 12
    levels: int = 4
    """Images that the generator makes on its way, at equal depths; the discriminator sees all of them at once."""

    def _check(self, owner: str) -> None:
        self._check_patches(owner)
        if self.levels < 1 or self.depth % self.levels:
            raise ValueError(f"{owner}.levels is {self.levels}; it must divide the depth, {self.depth}")
        if self.dim % (4 * self.heads):
            raise ValueError(
                f"{owner}.dim is {self.dim}; positions on two axes need a multiple of 4 times {self.heads} heads"
            )


@dataclass(frozen=True)
class GATGeneratorConfig(_Sizes, StyleConfig):
    """Generator; the defaults are GAT-S/2's, with images in the place of latents."""

    latent_dim: int = 64
    """Length of z ~ N(0, I)."""
    mapping_depth: int = 2
    """Layers from z to w."""

    def __post_init__(self) -> None:
        self._check("generator")
        self._check_styles()

    @property
    def blocks(self) -> int:
        """Transformer blocks, and so the number of w that an image can be made of; an output has its block's."""
        return self.depth

    @property
    def style_dim(self) -> int:
        """Length of w: the width."""
        return self.dim


@dataclass(frozen=True)
class GATDiscriminatorConfig(_Sizes):
    """Discriminator; the defaults are GAT-S/2's, with images in the place of latents."""

    layer_scale: float = 0.1
    """What the branches of the blocks are multiplied by at the start, channel by channel (published)."""
    information: float = 0.125
    """What is left of the image in the first level, but for 1 percent; the last level has all (published)."""
    augment: tuple[str, ...] = ("color_0.5", "translation_0.125", "cutout_1.0", "flip_0.4")
    """DiffAug policy, applied to whatever the discriminator is given, to all levels alike."""
    class_dim: int = 2048
    """With classes: the numbers that the score is the product of, the image's with the class's (published)."""

    def __post_init__(self) -> None:
        self._check("discriminator")
        if self.class_dim < 1:
            raise ValueError(f"discriminator.class_dim is {self.class_dim}; it must be at least 1")
        if not 0 < self.information <= 1:
            raise ValueError(f"discriminator.information is {self.information}; it must be in (0, 1]")
        check_policy(self.augment)


class MappingLayers(nn.Module):
    """Layers of the given widths with SiLU between them, whose learning rate is multiplied by `lr_multiplier`."""

    def __init__(self, widths: list[int], lr_multiplier: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            # The gain makes the variance Xavier's.
            EqualizedLinear(a, b, lr_multiplier=lr_multiplier, gain=(2 * a / (a + b)) ** 0.5)
            for a, b in pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(F.silu(x) if i else x)
        return x


class GATMapping(nn.Module):
    """z `(B, latent_dim)` and its class, each scaled to unit mean square, to w `(B, style_dim)`."""

    def __init__(self, config: GATGeneratorConfig) -> None:
        super().__init__()
        self.latent = LatentAndClass(config.classes, config.latent_dim)
        widths = [self.latent.width, *[config.style_dim] * config.mapping_depth]
        self.layers = MappingLayers(widths, config.mapping_lr_multiplier)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(self.latent(normalized(z), labels))


class _Modulation(nn.Module):
    """`count` vectors of `dim` numbers that w chooses, near 0 at the start: `(B, 1, dim)` each."""

    def __init__(self, config: GATGeneratorConfig, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(config.style_dim, count * config.dim)

    def forward(self, w: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(w))[:, None].chunk(self.count, dim=-1)


class GeneratorBlock(nn.Module):
    """`x + gate(w) * attn((1 + scale(w)) * norm(x))`, the MLP likewise; x `(B, N, dim)`, w `(B, style_dim)`."""

    recompute = True  # under gradient checkpointing

    def __init__(self, config: GATGeneratorConfig) -> None:
        super().__init__()
        self.modulation = _Modulation(config, 4)
        self.norm1 = nn.RMSNorm(config.dim, eps=EPS, elementwise_affine=False)
        self.attn = RotaryAttention(config.dim, config.heads, config.side)
        self.norm2 = nn.RMSNorm(config.dim, eps=EPS, elementwise_affine=False)
        self.mlp = GatedMLP(config.dim, config.mlp_ratio)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scale1, gate1, scale2, gate2 = self.modulation(w)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2))


class ToImage(nn.Module):
    """Tokens `(B, N, dim)`, normed and scaled by w, to patches of the image `(B, channels, S, S)`."""

    def __init__(self, config: GATGeneratorConfig) -> None:
        super().__init__()
        self.side, self.patch_size = config.side, config.patch_size
        self.modulation = _Modulation(config, 1)
        self.norm = nn.RMSNorm(config.dim, eps=EPS, elementwise_affine=False)
        self.linear = nn.Linear(config.dim, config.channels * config.patch_size**2)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        (scale,) = self.modulation(w)
        patches = self.linear(self.norm(x) * (1 + scale)).unflatten(1, (self.side, self.side))
        return F.pixel_shuffle(patches.permute(0, 3, 1, 2), self.patch_size)


class Generator(StyleGenerator):
    """z `(B, latent_dim)`, and labels `(B,)` if it has classes, to images `(B, channels, S, S)`, S = `image_size`;
    linear output, without tanh.

    The tokens start as fixed positions; z comes in through w, which scales every norm and gates every branch. At
    `levels` equal depths the tokens give an image, and level i is the sum of the first i: the last is the result.
    """

    positions: Tensor

    def __init__(self, config: GATGeneratorConfig) -> None:
        super().__init__(config)
        self.register_buffer("positions", sincos_positions(config.side, config.dim), persistent=False)
        self.blocks = nn.ModuleList(GeneratorBlock(config) for _ in range(config.depth))
        self.to_image = nn.ModuleList(ToImage(config) for _ in range(config.levels))
        init_linears(self)
        for module in self.modules():
            if isinstance(module, _Modulation):
                nn.init.xavier_uniform_(module.linear.weight, gain=MODULATION_GAIN)

    def make_mapping(self) -> nn.Module:
        return GATMapping(self.config)

    def forward(self, z: Tensor, labels: Tensor | None = None, *, levels: bool = False) -> Tensor:
        """Images of z; with `levels`, all levels one after the other, `(B, levels * channels, S, S)`."""
        w = self.training_styles(z, labels)
        return self.synthesize_levels(self._of_every_block(w)) if levels else self.synthesize(w)

    def synthesize_blocks(self, styles: Tensor) -> Tensor:
        return self.synthesize_levels(styles)[:, -self.config.channels :]

    def synthesize_levels(self, styles: Tensor) -> Tensor:
        """All levels of the images of w `(B, blocks, style_dim)`."""
        every = self.config.depth // self.config.levels
        x = self.positions.expand(len(styles), -1, -1)
        images: list[Tensor] = []
        for number, (block, w) in enumerate(zip(self.blocks, styles.unbind(1), strict=True), 1):
            x = block(x, w)
            if number % every == 0:
                image = self.to_image[len(images)](x, w)
                images.append(images[-1] + image if images else image)
        return torch.cat(images, dim=1)


class DiscriminatorBlock(nn.Module):
    """`x + a * attn(norm(x))`, then `x + b * mlp(norm(x))` with learned scales a and b of each channel."""

    recompute = True  # under gradient checkpointing

    def __init__(self, config: GATDiscriminatorConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.dim, eps=EPS)
        self.attn = RotaryAttention(config.dim, config.heads, config.side)
        self.scale1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        self.norm2 = nn.RMSNorm(config.dim, eps=EPS)
        self.mlp = GatedMLP(config.dim, config.mlp_ratio)
        self.scale2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.attn(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class Discriminator(nn.Module):
    """Images `(B, channels, S, S)`, or all their levels `(B, levels * channels, S, S)`, to one unbounded score each,
    `(B,)`.

    DiffAug first, unless `augment` is False, alike for all levels; an image without levels is taken for each of them.
    Then noise, the more the earlier the level; patches of all levels together, fixed positions, a class token; the
    blocks; the class token's normed value gives the score, with classes as a product with a vector of the image's
    class. The noise is drawn in evaluation too.
    """

    positions: Tensor

    def __init__(self, config: GATDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.patches = nn.Conv2d(config.levels * config.channels, config.dim, patch, stride=patch)
        self.register_buffer("positions", sincos_positions(config.side, config.dim), persistent=False)
        self.cls_token = learned_embedding(1, 1, config.dim)
        self.blocks = nn.ModuleList(DiscriminatorBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=EPS)
        self.head = nn.Linear(config.dim, config.class_dim if config.classes else 1)
        self.class_vector: nn.Sequential | None = None
        if config.classes:
            embedding = nn.Embedding(config.classes, config.class_dim)
            nn.init.normal_(embedding.weight, std=0.02)
            self.class_vector = nn.Sequential(embedding, MappingLayers([config.class_dim] * 3, CLASS_LR_MULTIPLIER))
        init_linears(self)

    def forward(self, images: Tensor, labels: Tensor | None = None, augment: bool = True) -> Tensor:
        config = self.config
        check_labels(config.classes, labels)
        levels = list(images.split(config.channels, dim=1))
        if len(levels) not in (1, config.levels):
            raise ValueError(
                f"images must have {config.channels} channels, or those of {config.levels} levels, got "
                f"{tuple(images.shape)}"
            )
        if augment:
            levels = augment_alike(levels, config.augment)
        if len(levels) == 1:
            levels *= config.levels
        x = self.patches(torch.cat(perturb(levels, config.information), dim=1)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), x + self.positions], dim=1)
        for block in self.blocks:
            x = block(x)
        score = self.head(self.norm(x[:, 0]))
        return score.squeeze(-1) if self.class_vector is None else (score * self.class_vector(labels)).sum(1)
