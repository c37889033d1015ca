"""StyleNAT's generator: a style-based transformer with several dilations of neighborhood attention side by side.

Source: "StyleNAT: Giving Each Head a New Perspective", Walton et al. 2022, arXiv 2211.05770, and facts read in the
authors' published code. Written from the description. Each block's Hydra neighborhood attention, whose groups of heads
have dilations of their own, is one call of `natten_ext.neighborhood_attention` with one table. `docs/stylenat.md` says
where the paper, the published code and this file differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gans.models.stylenat_layers import ImageNetNormalization, LevelUp, StyleBlock, ToRGB
from gans.models.styles import StyleConfig, StyleGenerator
from natten_ext import GridAttention, NeighborhoodAttention

BASE_SIZE = 4
"""Side of the first level's map, where attention is full."""

Normalization = Literal["imagenet", "none"]


def check_normalization(owner: str, normalization: str, channels: int) -> None:
    """ValueError unless the images' channels and normalisation fit each other."""
    if channels not in (1, 3):
        raise ValueError(f"{owner}.channels is {channels}; it must be 1 or 3")
    if normalization not in ("imagenet", "none"):
        raise ValueError(f"{owner}.normalization is {normalization!r}; it must be 'imagenet' or 'none'")
    if normalization == "imagenet" and channels != 3:
        raise ValueError(f"{owner}.normalization is 'imagenet', which is for 3 channels; channels is {channels}")


@dataclass(frozen=True)
class StyleNATGeneratorConfig(StyleConfig):
    """Generator; the defaults are the published FFHQ 256 px configuration (48.92 M parameters).

    Level i works on a map of side `4 * 2**i` with `dims[i]` channels; the last is the image's size.
    """

    dims: tuple[int, ...] = (512, 512, 512, 512, 512, 256, 128)
    """Channels of each level, from the 4x4 map to the image's size."""
    dilations: tuple[str, ...] = ("1", "1,2", "1,4", "1,8", "1,16", "1,32")
    """For each level from 8x8 on, the dilation of every partition of its heads, such as "1,8". Heads that cannot be
    divided evenly go one each to the last partitions (as published)."""
    kernel_size: int = 7
    """Keys per axis of the neighborhood attention; `kernel_size * dilation` must not exceed the level's map."""
    head_dim: int = 32
    """Channels of a head, where that makes at least `min_heads` heads."""
    min_heads: int = 4
    """Least number of heads of a level."""
    depth: int = 2
    """Blocks of each level; each has a w of its own under style mixing."""
    mlp_ratio: int = 4
    """Hidden width of the MLPs over their width."""
    channels: int = 3
    """Image channels, 1 or 3."""
    normalization: Normalization = "imagenet"
    """What the networks see: images with ImageNet's mean and deviation (published), or in [-1, 1] ("none"). The
    generator undoes it, so what comes out is in [-1, 1] either way."""

    def __post_init__(self) -> None:
        check_normalization("generator", self.normalization, self.channels)
        self._check_styles()
        for name in ("kernel_size", "head_dim", "min_heads", "depth", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"generator.{name} is {getattr(self, name)}; it must be at least 1")
        if len(self.dims) < 2 or len(self.dilations) != len(self.dims) - 1:
            raise ValueError(
                f"generator.dilations has {len(self.dilations)} levels and dims {len(self.dims)}; dilations must have "
                "one less, since the first level's attention is full"
            )
        for dim in self.dims:
            if dim % 4 or dim < 8:
                raise ValueError(f"generator.dims has {dim}; it must be a multiple of 4, at least 8")
            if dim % self.heads_of(dim):
                raise ValueError(f"generator.dims has {dim}, which its {self.heads_of(dim)} heads do not divide")
        for size, dim, dilations in zip(self.sizes[1:], self.dims[1:], self.partitions, strict=True):
            if len(dilations) > self.heads_of(dim):
                raise ValueError(
                    f"generator.dilations has {len(dilations)} partitions at {size} px, where there are "
                    f"{self.heads_of(dim)} heads"
                )
            for dilation in dilations:
                if self.kernel_size * dilation > size:
                    raise ValueError(
                        f"generator.dilations has {dilation} at {size} px; kernel_size ({self.kernel_size}) times it "
                        "must not exceed the map"
                    )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each level's map."""
        return tuple(BASE_SIZE * 2**level for level in range(len(self.dims)))

    @property
    def image_size(self) -> int:
        return self.sizes[-1]

    @property
    def partitions(self) -> tuple[tuple[int, ...], ...]:
        """`dilations` as numbers."""
        try:
            numbers = tuple(tuple(int(number) for number in level.split(",")) for level in self.dilations)
        except ValueError:
            raise ValueError(f"generator.dilations is {self.dilations}; write numbers such as 1,8") from None
        if any(dilation < 1 for level in numbers for dilation in level):
            raise ValueError(f"generator.dilations is {self.dilations}; a dilation must be at least 1")
        return numbers

    @property
    def blocks(self) -> int:
        """Blocks of all levels, and so the number of w that an image can be made of."""
        return len(self.dims) * self.depth

    def heads_of(self, dim: int) -> int:
        """Heads of a level with `dim` channels."""
        return max(dim // self.head_dim, self.min_heads)


def dilation_of_heads(dilations: tuple[int, ...], heads: int) -> list[int]:
    """The dilation of every head: equal groups, the remainder one each to the last ones (published rule)."""
    share, rest = divmod(heads, len(dilations))
    sizes = [share + (group >= len(dilations) - rest) for group in range(len(dilations))]
    return [dilation for dilation, size in zip(dilations, sizes, strict=True) for _ in range(size)]


class Level(nn.Module):
    """The blocks of one map size, the step to the next (but for the last), and what this level adds to the image."""

    def __init__(self, config: StyleNATGeneratorConfig, level: int) -> None:
        super().__init__()
        size, dim = config.sizes[level], config.dims[level]
        heads = config.heads_of(dim)

        def attention() -> GridAttention | NeighborhoodAttention:
            if level == 0:
                return GridAttention(dim, heads, size)
            dilations = dilation_of_heads(config.partitions[level - 1], heads)
            return NeighborhoodAttention(dim, heads, config.kernel_size, dilations)  # type: ignore[arg-type]

        self.blocks = nn.ModuleList(
            StyleBlock(dim, attention(), latent_dim=config.latent_dim, mlp_ratio=config.mlp_ratio)
            for _ in range(config.depth)
        )
        last = level == len(config.dims) - 1
        next_dim = dim if last else config.dims[level + 1]
        self.upsample = None if last else LevelUp(dim, next_dim, 2 * size)
        self.to_rgb = ToRGB(next_dim, config.channels)

    def forward(self, x: Tensor, image: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor]:
        """The map and the image so far, after this level; w is `(B, depth, latent)`."""
        for block, style in zip(self.blocks, w.unbind(1), strict=True):
            x = block(x, style)
        if self.upsample is not None:
            x = self.upsample(x)
        return x, self.to_rgb(x, image)


class Generator(StyleGenerator):
    """z `(B, latent_dim)` to images `(B, channels, S, S)`, S = `config.image_size`; linear output, without tanh.

    A learned 4x4 map goes through the levels; w = mapping(z) modulates every norm.
    """

    def __init__(self, config: StyleNATGeneratorConfig) -> None:
        super().__init__(config)
        self.input = nn.Parameter(torch.randn(1, BASE_SIZE, BASE_SIZE, config.dims[0]))
        self.levels = nn.ModuleList(Level(config, level) for level in range(len(config.dims)))
        self.normalization = ImageNetNormalization() if config.normalization == "imagenet" else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain=0.02)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def synthesize_blocks(self, styles: Tensor) -> Tensor:
        x = self.input.expand(len(styles), -1, -1, -1)
        image: Tensor | None = None
        for level, of_level in zip(self.levels, styles.split(self.config.depth, dim=1), strict=True):
            x, image = level(x, image, of_level)
        assert image is not None
        return image if self.normalization is None else self.normalization.inverse(image)
