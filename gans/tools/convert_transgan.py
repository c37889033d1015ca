"""How TransGAN's published checkpoints are laid out, for `gans.tools.convert`.

The files hold `gen_state_dict`, `dis_state_dict` and `avg_gen_state_dict` (the average has parameters only). Position
embeddings are `(1, H * W, C)` there and `(1, H, W, C)` here. Relative position tables are `((2 w - 1)^2, heads)`,
indexed by query minus key, there and `(heads, 2 w - 1, 2 w - 1)`, indexed by key minus query, here: both axes of the
offsets are turned around. The published index buffers are checked and left behind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gans.tools.convert import Extra, Layout, Source
from gans.transgan import Generator

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

SMALL_DISCRIMINATOR: tuple[Replacement, ...] = (
    _from_one("patches fRGB"),
    _from_one("pos_embed pos_embed"),
    _from_one("stages blocks"),
    (r"^last\.", "last_block."),
    (r"^norm\.", "norm.norm."),
    *BLOCK,
)


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


def layout(generator: tuple[Replacement, ...], discriminator: tuple[Replacement, ...]) -> Layout:
    """The layout of one of the four published pairs of networks."""

    def sources(model: nn.Module) -> dict[str, Source]:
        replacements = generator if isinstance(model, Generator) else discriminator
        state = model.state_dict()
        return {name: _source(name, value, published_name(name, replacements)) for name, value in state.items()}

    def extras(model: nn.Module) -> dict[str, Extra]:
        tables = [source for source in sources(model).values() if source.convert is flip_table]
        windows = {source.name: (math.isqrt(source.shape[0]) + 1) // 2 for source in tables}
        return {
            name.replace("bias_table", "index"): Extra((window**2, window**2), partial(published_index, window))
            for name, window in windows.items()
        }

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
    "cifar10": layout(SMALL_GENERATOR, SMALL_DISCRIMINATOR),
    "stl10": layout(SMALL_GENERATOR, SMALL_DISCRIMINATOR),
}
"""By preset."""
