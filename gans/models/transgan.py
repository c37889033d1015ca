"""TransGAN: a generator and a discriminator made of transformer blocks only.

Source: "TransGAN: Two Pure Transformers Can Make One Strong GAN, and That Can Scale Up", Jiang et al. 2021,
arXiv 2102.07074, and facts read in the authors' published code. Written from the description; attention runs
through `natten_ext` (grid attention with a relative position table; the window is the whole map in the
configurations here), so the gradient penalty differentiates a fused kernel twice.

Where the paper, the published code and this file differ, `docs/transgan.md` has the table. In short: relative
position tables are indexed by key minus query (published: query minus key; flip both axes to convert),
position embeddings keep their map shape, and everything else is an option of the configurations below, whose
defaults are those of the published CIFAR-10 code. The recipes are in `gans/recipes/presets_transgan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.models.augment import check_policy, diff_augment
from gans.models.conditioning import ClassesConfig, ClassScore, LatentAndClass
from gans.models.layers import (
    Block,
    LinearInit,
    NormName,
    anti_alias,
    init_weights,
    learned_embedding,
    make_norm,
    to_image,
    to_map,
)


@dataclass(frozen=True)
class _Blocks(ClassesConfig):
    """What the blocks of both networks have in common."""

    heads: int = 4
    """Attention heads of every block; the scale is head_dim ** -0.5."""
    mlp_ratio: int = 4
    """Hidden width of the MLPs over their width."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have a bias (published: no)."""
    norm: NormName = "layer"
    """"layer", or the paper's modified normalisation "rms" (published code: CIFAR-10 "layer", STL-10 "rms")."""

    def _check_stages(
        self,
        owner: str,
        sizes: tuple[int, ...],
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        windows: tuple[int, ...],
    ) -> None:
        """ValueError unless depths and windows have one value per stage that its map and the heads allow."""
        self._check_classes(owner)
        if not sizes:
            raise ValueError(f"{owner}.depths and its widths are empty; there must be at least one stage")
        for name, values in (("depths", depths), ("windows", windows)):
            if len(values) != len(sizes):
                raise ValueError(f"{owner}.{name} is {values}; it needs one value for each of {len(sizes)} stages")
        if min(depths) < 0:
            raise ValueError(f"{owner}.depths is {depths}; a depth cannot be negative")
        for size, dim, window in zip(sizes, dims, windows, strict=True):
            if size < 1 or window < 1 or size % window:
                raise ValueError(f"{owner}.windows has {window}, which does not divide its map of {size}x{size}")
            if dim < 1 or dim % self.heads:
                raise ValueError(f"{owner}.heads is {self.heads}, which does not divide a stage's {dim} channels")


@dataclass(frozen=True)
class GeneratorConfig(_Blocks):
    """Generator; the defaults are the published CIFAR-10 configuration (83,312,495 parameters).

    Stage i works on a map of side `base_size * 2**i`. The first stage has `base_dim` channels; a bicubic doubling keeps
    the channels, pixel shuffle divides them by 4.
    """

    latent_dim: int = 256
    """Length of z ~ N(0, I)."""
    base_size: int = 8
    """Side of the first stage's map."""
    base_dim: int = 1024
    """Channels of the first stage."""
    depths: tuple[int, ...] = (5, 4, 2)
    """Blocks of each stage."""
    windows: tuple[int, ...] = (8, 16, 32)
    """Side of each stage's attention windows; the map's own side makes attention global."""
    channels: int = 3
    """Image channels, 1 or 3."""
    noise: bool = False
    """Noise at attention inputs: in the published code only the 256-pixel generators have it."""
    bicubic: int = 0
    """How many doublings, from the first, are bicubic; the rest are pixel shuffles (published 256-pixel code: 2)."""
    anti_alias: int = 0
    """How many doublings, from the last, come after an anti-alias filter (published CelebA-HQ code: 2, Church: 0)."""
    cross_attention: bool = False
    """Whether each block begins with attention to a second map made from z (published CelebA-HQ code: yes)."""
    latent_norm: bool = False
    """Whether z is scaled to norm sqrt(latent_dim) (an option of the published 256-pixel code, off there)."""
    linear_init: LinearInit = "torch"
    """The published generator keeps PyTorch's default for Linear; "trunc_normal" is the discriminator's rule."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"generator.channels is {self.channels}; it must be 1 or 3")
        if self.latent_dim < 1:
            raise ValueError(f"generator.latent_dim is {self.latent_dim}; it must be positive")
        doublings = max(len(self.depths) - 1, 0)
        for name in ("bicubic", "anti_alias"):
            if not 0 <= getattr(self, name) <= doublings:
                raise ValueError(f"generator.{name} is {getattr(self, name)}; there are {doublings} doublings")
        if self.base_dim % 4 ** (doublings - self.bicubic):
            raise ValueError(
                f"generator.base_dim is {self.base_dim}; {doublings - self.bicubic} pixel shuffles need a multiple of "
                f"{4 ** (doublings - self.bicubic)}"
            )
        self._check_stages("generator", self.sizes, self.dims, self.depths, self.windows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each stage's map; the last is the image's."""
        return tuple(self.base_size * 2**i for i in range(len(self.depths)))

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.base_dim // 4 ** max(0, i - self.bicubic) for i in range(len(self.depths)))

    @property
    def image_size(self) -> int:
        return self.sizes[-1]


@dataclass(frozen=True)
class DiscriminatorConfig(_Blocks):
    """Multi-scale discriminator; the defaults are the published CIFAR-10 configuration (10,210,400
    parameters).

    Stage i sees patches of side `patch_size * 2**i`, each embedded in `patch_dims[i]` channels that are
    appended to what the stage before hands on, so its width is the sum of the first i + 1 entries.
    """

    image_size: int = 32
    """Side of the images."""
    channels: int = 3
    """Image channels, 1 or 3."""
    patch_size: int = 2
    """Side of the first stage's patches."""
    patch_dims: tuple[int, ...] = (288, 96)
    """Channels added by each stage's patches. Published 3C/4, C/4 with C = 384; paper C/4, C/4, C/2 at 3 scales."""
    depths: tuple[int, ...] = (3, 3)
    """Blocks of each stage."""
    windows: tuple[int, ...] = (16, 8)
    """Side of each stage's attention windows; the map's own side makes attention global."""
    full_blocks: tuple[int, ...] = ()
    """How many blocks of each stage, from its last, attend over the whole map instead (published 256-pixel code: one,
    where the map has 4096 tokens); empty for none."""
    overlap: bool = False
    """Whether the first stage's patches have twice the side, half of it shared (published CelebA-HQ code: yes)."""
    rel_pos_bias: bool = True
    """Whether the stages have relative position tables (published CelebA-HQ code: no)."""
    last_depth: int = 1
    """Blocks after the class token is appended, over all tokens and without a position table."""
    noise: bool = True
    """Noise at attention inputs, with a learned strength that starts at 0."""
    linear_init: LinearInit = "trunc_normal"
    """Initialisation of every Linear."""
    augment: tuple[str, ...] = ("translation", "cutout", "color")
    """DiffAug policy, applied to whatever the discriminator is given, interpolates included."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"discriminator.channels is {self.channels}; it must be 1 or 3")
        coarsest = self.patch_size * 2 ** (len(self.patch_dims) - 1)
        if self.patch_size < 1 or self.image_size % coarsest:
            raise ValueError(
                f"discriminator.image_size is {self.image_size}; its coarsest patches ({coarsest} px) must divide it"
            )
        if self.overlap and self.patch_size % 2:
            raise ValueError(f"discriminator.patch_size is {self.patch_size}; patches that overlap need an even side")
        if self.last_depth < 1:
            raise ValueError(f"discriminator.last_depth is {self.last_depth}; the class token needs at least 1 block")
        check_policy(self.augment)
        self._check_stages("discriminator", self.sizes, self.dims, self.depths, self.windows)
        if self.full_blocks:
            fits = len(self.full_blocks) == len(self.depths)
            if not fits or any(not 0 <= n <= depth for n, depth in zip(self.full_blocks, self.depths, strict=True)):
                raise ValueError(
                    f"discriminator.full_blocks is {self.full_blocks}; it needs one number for each of the depths "
                    f"{self.depths} and no larger"
                )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each stage's map."""
        return tuple(self.image_size // (self.patch_size * 2**i) for i in range(len(self.patch_dims)))

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(sum(self.patch_dims[: i + 1]) for i in range(len(self.patch_dims)))


def _stage(
    config: GeneratorConfig | DiscriminatorConfig,
    dim: int,
    windows: Sequence[int | None],
    *,
    rel_pos_bias: bool = True,
    context_dim: int | None = None,
) -> nn.ModuleList:
    """One block of width `dim` for each window."""
    return nn.ModuleList(
        Block(
            dim,
            config.heads,
            window=window,
            norm=config.norm,
            noise=config.noise,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=config.qkv_bias,
            rel_pos_bias=rel_pos_bias,
            context_dim=context_dim,
        )
        for window in windows
    )


class Generator(nn.Module):
    """z `(B, latent_dim)`, and labels `(B,)` if it has classes, to images `(B, channels, S, S)`, S = `image_size`.

    Linear to the first map, then per stage: add a learned position embedding, run the blocks, double the map's
    side for the next stage; last a 1x1 convolution. The output is linear, without tanh, so values may leave
    [-1, 1]. With cross attention, a second Linear makes a map of the first's shape from z, to which all blocks attend.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.latent = LatentAndClass(config.classes, config.latent_dim)
        self.input = nn.Linear(self.latent.width, config.base_size**2 * config.base_dim)
        self.context: nn.Linear | None = None
        if config.cross_attention:
            self.context = nn.Linear(self.latent.width, config.base_size**2 * config.base_dim)
            self.context_pos_embed = nn.Parameter(torch.zeros(1, config.base_size**2, config.base_dim))
        self.pos_embed = nn.ParameterList(
            learned_embedding(1, size, size, dim) for size, dim in zip(config.sizes, config.dims, strict=True)
        )
        self.stages = nn.ModuleList(
            _stage(config, dim, [window] * depth, context_dim=config.base_dim if config.cross_attention else None)
            for dim, depth, window in zip(config.dims, config.depths, config.windows, strict=True)
        )
        self.to_rgb = nn.Conv2d(config.dims[-1], config.channels, kernel_size=1)
        init_weights(self, config.linear_init)

    def _double(self, x: Tensor, stage: int) -> Tensor:
        """The map of the stage before, at the side of `stage`."""
        if stage >= len(self.stages) - self.config.anti_alias:
            x = anti_alias(x)
        if stage <= self.config.bicubic:
            return to_map(F.interpolate(to_image(x), scale_factor=2, mode="bicubic"))
        return to_map(F.pixel_shuffle(to_image(x), 2))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        config = self.config
        if config.latent_norm:
            z = F.normalize(z, dim=1) * config.latent_dim**0.5
        z = self.latent(z, labels)
        x = self.input(z).view(-1, config.base_size, config.base_size, config.base_dim)
        context = None
        if self.context is not None:
            context = self.context(z).view(-1, config.base_size**2, config.base_dim) + self.context_pos_embed
        for i, (pos_embed, blocks) in enumerate(zip(self.pos_embed, self.stages, strict=True)):
            if i > 0:
                x = self._double(x, i)
            x = x + pos_embed
            for block in blocks:
                x = block(x, context)
        return self.to_rgb(to_image(x))


class Discriminator(nn.Module):
    """Images `(B, channels, S, S)`, and labels `(B,)` if it has classes, to one unbounded score each, `(B,)`.

    DiffAug first, also on interpolates of the gradient penalty, unless `augment` is False. Then per stage: append
    the patches of this scale, add a position embedding, run the blocks, average-pool by 2. A class token, without
    position, joins before the last block; its normed value gives the score.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.ModuleList()
        for i, dim in enumerate(config.patch_dims):
            stride = config.patch_size * 2**i
            reach = stride // 2 if i == 0 and config.overlap else 0
            self.patches.append(nn.Conv2d(config.channels, dim, stride + 2 * reach, stride=stride, padding=reach))
        self.pos_embed = nn.ParameterList(
            learned_embedding(1, size, size, dim) for size, dim in zip(config.sizes, config.dims, strict=True)
        )
        self.stages = nn.ModuleList()
        full_blocks = config.full_blocks or (0,) * len(config.depths)
        for size, dim, depth, window, full in zip(
            config.sizes, config.dims, config.depths, config.windows, full_blocks, strict=True
        ):
            windows = [window] * (depth - full) + [size] * full
            self.stages.append(_stage(config, dim, windows, rel_pos_bias=config.rel_pos_bias))
        width = config.dims[-1]
        self.cls_token = learned_embedding(1, 1, width)
        self.last = _stage(config, width, [None] * config.last_depth)
        self.norm = make_norm(config.norm, width)
        self.head = nn.Linear(width, 1)
        self.class_score = ClassScore(config.classes, width)
        init_weights(self, config.linear_init)

    def forward(self, images: Tensor, labels: Tensor | None = None, augment: bool = True) -> Tensor:
        if augment:
            images = diff_augment(images, self.config.augment)
        x: Tensor | None = None
        for patches, pos_embed, blocks in zip(self.patches, self.pos_embed, self.stages, strict=True):
            tokens = to_map(patches(images))
            if x is not None:
                tokens = torch.cat([to_map(F.avg_pool2d(to_image(x), 2)), tokens], dim=-1)
            x = tokens + pos_embed
            for block in blocks:
                x = block(x)
        assert x is not None  # there is at least one stage
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), x.flatten(1, 2)], dim=1)
        for block in self.last:
            x = block(x)
        features = self.norm(x[:, 0])
        return self.head(features).squeeze(-1) + self.class_score(features, labels)
