"""TransGAN: a generator and a discriminator made of transformer blocks only.

Source: "TransGAN: Two Pure Transformers Can Make One Strong GAN, and That Can Scale Up", Jiang et al. 2021,
arXiv 2102.07074, and facts read in the authors' published code. Written from the description; attention runs
through `natten_ext` (grid attention with a relative position table; the window is the whole map in the
configurations here), so the gradient penalty differentiates a fused kernel twice.

Where the paper, the published code and this file differ, `docs/transgan.md` has the table. In short: relative
position tables are indexed by key minus query (published: query minus key; flip both axes to convert),
position embeddings keep their map shape, and everything else is an option of the configurations below, whose
defaults are those of the published CIFAR-10 code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.augment import check_policy, diff_augment
from gans.layers import (
    Block,
    LinearInit,
    NormName,
    init_weights,
    learned_embedding,
    make_norm,
    to_image,
    to_map,
)


@dataclass(frozen=True)
class _Blocks:
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

    Stage i works on a map of side `base_size * 2**i` with `base_dim / 4**i` channels.
    """

    latent_dim: int = 256
    """Length of z ~ N(0, I)."""
    base_size: int = 8
    """Side of the first stage's map."""
    base_dim: int = 1024
    """Channels of the first stage; pixel shuffle divides them by 4 at each doubling."""
    depths: tuple[int, ...] = (5, 4, 2)
    """Blocks of each stage."""
    windows: tuple[int, ...] = (8, 16, 32)
    """Side of each stage's attention windows; the map's own side makes attention global."""
    channels: int = 3
    """Image channels, 1 or 3."""
    noise: bool = False
    """Noise at attention inputs: in the published code only the 256-pixel generators have it."""
    linear_init: LinearInit = "torch"
    """The published generator keeps PyTorch's default for Linear; "trunc_normal" is the discriminator's rule."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"generator.channels is {self.channels}; it must be 1 or 3")
        if self.latent_dim < 1:
            raise ValueError(f"generator.latent_dim is {self.latent_dim}; it must be positive")
        if self.base_dim % 4 ** (len(self.depths) - 1):
            raise ValueError(
                f"generator.base_dim is {self.base_dim}; {len(self.depths)} stages need a multiple of "
                f"{4 ** (len(self.depths) - 1)}"
            )
        self._check_stages("generator", self.sizes, self.dims, self.depths, self.windows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each stage's map; the last is the image's."""
        return tuple(self.base_size * 2**i for i in range(len(self.depths)))

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.base_dim // 4**i for i in range(len(self.depths)))

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
        if self.last_depth < 1:
            raise ValueError(f"discriminator.last_depth is {self.last_depth}; the class token needs at least 1 block")
        check_policy(self.augment)
        self._check_stages("discriminator", self.sizes, self.dims, self.depths, self.windows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each stage's map."""
        return tuple(self.image_size // (self.patch_size * 2**i) for i in range(len(self.patch_dims)))

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(sum(self.patch_dims[: i + 1]) for i in range(len(self.patch_dims)))


def _stage(config: GeneratorConfig | DiscriminatorConfig, dim: int, depth: int, window: int | None) -> nn.Sequential:
    """`depth` blocks of one width."""
    return nn.Sequential(
        *(
            Block(
                dim,
                config.heads,
                window=window,
                norm=config.norm,
                noise=config.noise,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=config.qkv_bias,
            )
            for _ in range(depth)
        )
    )


class Generator(nn.Module):
    """z `(B, latent_dim)` to images `(B, channels, S, S)`, S = `config.image_size`.

    Linear to the first map, then per stage: add a learned position embedding, run the blocks, pixel shuffle
    to the next stage; last a 1x1 convolution. The output is linear, without tanh, so values may leave [-1,
    1].
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.input = nn.Linear(config.latent_dim, config.base_size**2 * config.base_dim)
        self.pos_embed = nn.ParameterList(
            learned_embedding(1, size, size, dim) for size, dim in zip(config.sizes, config.dims, strict=True)
        )
        self.stages = nn.ModuleList(
            _stage(config, dim, depth, window)
            for dim, depth, window in zip(config.dims, config.depths, config.windows, strict=True)
        )
        self.to_rgb = nn.Conv2d(config.dims[-1], config.channels, kernel_size=1)
        init_weights(self, config.linear_init)

    def forward(self, z: Tensor) -> Tensor:
        config = self.config
        x = self.input(z).view(-1, config.base_size, config.base_size, config.base_dim)
        for i, (pos_embed, blocks) in enumerate(zip(self.pos_embed, self.stages, strict=True)):
            if i > 0:
                x = to_map(F.pixel_shuffle(to_image(x), 2))
            x = blocks(x + pos_embed)
        return self.to_rgb(to_image(x))


class Discriminator(nn.Module):
    """Images `(B, channels, S, S)` to one unbounded score each, `(B,)`.

    DiffAug first, also on interpolates of the gradient penalty, unless `augment` is False. Then per stage: append
    the patches of this scale, add a position embedding, run the blocks, average-pool by 2. A class token, without
    position, joins before the last block; its normed value gives the score.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.ModuleList(
            nn.Conv2d(config.channels, dim, kernel_size=size, stride=size)
            for dim, size in ((dim, config.patch_size * 2**i) for i, dim in enumerate(config.patch_dims))
        )
        self.pos_embed = nn.ParameterList(
            learned_embedding(1, size, size, dim) for size, dim in zip(config.sizes, config.dims, strict=True)
        )
        self.stages = nn.ModuleList(
            _stage(config, dim, depth, window)
            for dim, depth, window in zip(config.dims, config.depths, config.windows, strict=True)
        )
        width = config.dims[-1]
        self.cls_token = learned_embedding(1, 1, width)
        self.last = _stage(config, width, config.last_depth, window=None)
        self.norm = make_norm(config.norm, width)
        self.head = nn.Linear(width, 1)
        init_weights(self, config.linear_init)

    def forward(self, images: Tensor, augment: bool = True) -> Tensor:
        if augment:
            images = diff_augment(images, self.config.augment)
        x: Tensor | None = None
        for patches, pos_embed, blocks in zip(self.patches, self.pos_embed, self.stages, strict=True):
            tokens = to_map(patches(images))
            if x is not None:
                tokens = torch.cat([to_map(F.avg_pool2d(to_image(x), 2)), tokens], dim=-1)
            x = blocks(tokens + pos_embed)
        assert x is not None  # there is at least one stage
        x = self.last(torch.cat([self.cls_token.expand(len(images), -1, -1), x.flatten(1, 2)], dim=1))
        return self.head(self.norm(x[:, 0])).squeeze(-1)
