"""How TransGAN's published checkpoints are laid out, for `gans.conversion.translation`.

The files hold `gen_state_dict`, `dis_state_dict` and `avg_gen_state_dict` (the average has parameters only). Position
embeddings are `(1, H * W, C)` there and `(1, H, W, C)` here. Relative position tables are `((2 w - 1)^2, heads)`,
indexed by query minus key, there and `(heads, 2 w - 1, 2 w - 1)`, indexed by key minus query, here: both axes of the
offsets are turned around. The published index buffers are checked and left behind. The files were not to be had; names
and shapes are those of the published code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from gans.conversion.translation import Extra, Layout, Source
from gans.models.transgan import Generator

TABLE = "attn.rel_pos_bias"


def flip_table(table: Tensor) -> Tensor:
    """`((2 w - 1)^2, heads)` by query minus key to `(heads, 2 w - 1, 2 w - 1)` by key minus query."""
    side = math.isqrt(len(table))
    return table.T.unflatten(1, (side, side)).flip(1, 2)


def published_index(window: int) -> Tensor:
    """`(w^2, w^2)` int64: the row of the published table for each query and key, both row by row.

    (dy + w - 1) (2 w - 1) + (dx + w - 1) with (dy, dx) the query's place minus the key's.
    """
    y, x = torch.arange(window**2).div(window, rounding_mode="floor"), torch.arange(window**2) % window
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


Replacement = tuple[str, str | Callable[[re.Match[str]], str]]


def _from_one(name: str) -> Replacement:
    """`name_1`, `name_2`... for our `name.0`, `name.1`..."""
    ours, published = name.split(" ")
    return rf"^{ours}\.(\d+)(?=\.|$)", lambda match: f"{published}_{int(match[1]) + 1}"


BLOCK: tuple[Replacement, ...] = (
    (r"\bnorm([12])\.", r"norm\1.norm."),
    (r"\bnoise\.strength$", "attn.noise_strength_1"),
    (r"\battn\.rel_pos_bias$", "attn.relative_position_bias_table"),
    (r"\bcross_attn\.(query|key|value)\.", lambda match: f"cross_attention.{match[1][0]}_transform."),
    (r"\bcross_attn\.", "cross_attention."),
)
"""Inside a transformer block, ours to published."""

SMALL_GENERATOR: tuple[Replacement, ...] = (
    (r"^input\.", "l1."),
    (r"^to_rgb\.", "deconv.0."),
    _from_one("pos_embed pos_embed"),
    (r"^stages\.0\.", "blocks.block."),
    (r"^stages\.(\d+)\.", lambda match: f"upsample_blocks.{int(match[1]) - 1}.block."),
    *BLOCK,
)
"""32 and 48 pixels."""

LARGE_GENERATOR: tuple[Replacement, ...] = (
    (r"^input\.", "l1."),
    (r"^context\.", "embedding_transform."),
    (r"^context_pos_embed$", "embed_pos"),
    (r"^to_rgb\.", "deconv.0."),
    _from_one("pos_embed pos_embed"),
    (r"^stages\.(\d+)\.", lambda match: f"blocks_{int(match[1]) + 1}.block."),
    *BLOCK,
)
"""256 pixels."""

DISCRIMINATOR: tuple[Replacement, ...] = (
    _from_one("patches fRGB"),
    _from_one("pos_embed pos_embed"),
    _from_one("stages blocks"),
    (r"^last\.", "last_block."),
    (r"^norm\.", "norm.norm."),
    *BLOCK,
)

CHURCH_DISCRIMINATOR: tuple[Replacement, ...] = ((r"^stages\.0\.2\.", "blocks_11.0."), *DISCRIMINATOR)
"""The block of a stage that attends to the whole map has a list of its own."""

CELEBAHQ_DISCRIMINATOR: tuple[Replacement, ...] = ((r"^stages\.1\.2\.", "blocks_21.0."), *DISCRIMINATOR)


def published_name(name: str, replacements: tuple[Replacement, ...]) -> str:
    """The published name of a tensor of ours."""
    for pattern, replacement in replacements:
        name = re.sub(pattern, replacement, name)
    return name


def _source(ours: str, value: Tensor, name: str) -> Source:
    shape = tuple(value.shape)
    if ours.endswith("rel_pos_bias"):
        heads, side, _ = shape
        return Source(name, (side**2, heads), flip_table)
    if ours.startswith("pos_embed."):
        one, height, width, channels = shape
        return Source(name, (one, height * width, channels), partial(torch.Tensor.reshape, shape=shape))
    return Source(name, shape, torch.clone)


IGNORED = frozenset(
    ["epoch", "gen_model", "dis_model", "gen_optimizer", "dis_optimizer", "best_fid", "path_helper", "args", "fixed_z"]
)
"""What the files hold beside the networks."""


def layout(
    generator: tuple[Replacement, ...],
    discriminator: tuple[Replacement, ...],
    constants: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Layout:
    """The layout of one of the four published pairs of networks; `constants` are shapes of further buffers."""

    def name_of(name: str, model: nn.Module) -> str:
        return published_name(name, generator if isinstance(model, Generator) else discriminator)

    def sources(model: nn.Module, names: Container[str]) -> dict[str, Source]:
        return {name: _source(name, value, name_of(name, model)) for name, value in model.state_dict().items()}

    def extras(model: nn.Module) -> dict[str, Extra]:
        found = {} if isinstance(model, Generator) else {name: Extra(shape) for name, shape in constants.items()}
        for name, value in model.state_dict().items():
            published = name_of(name, model)
            if name.endswith("rel_pos_bias"):
                window = (value.shape[1] + 1) // 2
                index = Extra((window**2, window**2), partial(published_index, window))
                found[published.replace("bias_table", "index")] = index
            elif name.endswith("cross_attn.query.weight"):  # beside it is a strength of noise that is never added
                found[published.replace("q_transform.weight", "noise_strength_1")] = Extra(())
        return found

    return Layout(
        networks={
            "generator": ("gen_state_dict", "generator"),
            "generator_ema": ("avg_gen_state_dict", "generator"),
            "discriminator": ("dis_state_dict", "discriminator"),
        },
        ignored=IGNORED,
        sources=sources,
        extras=extras,
    )


LAYOUTS = {
    "cifar10": layout(SMALL_GENERATOR, DISCRIMINATOR),
    "stl10": layout(SMALL_GENERATOR, DISCRIMINATOR),
    "church256": layout(LARGE_GENERATOR, CHURCH_DISCRIMINATOR),
    # Hz_fbank: the wavelet filters of DiffAug's "filter"; ours makes its own (gans.models.augment.BAND_FILTERS).
    "celebahq256": layout(LARGE_GENERATOR, CELEBAHQ_DISCRIMINATOR, {"Hz_fbank": (4, 43)}),
}
"""By preset."""
