"""How StyleNAT's published checkpoints are laid out, for `gans.conversion.translation`.

The files hold `g_ema` and `d`, some also `g`, newer ones all of them under `state_dicts`. Neighborhood tables are one
per partition of the heads, indexed by key minus query as here, and are joined; in the files of 2022 they are always
two, under other names. The 4x4 level's table is `(heads, 7, 7)` and is read through an index buffer: Swin's, turned
around on both axes, which makes it key minus query too. That buffer is checked, since a table read by query minus key
would have to be turned around. All filters are checked against those that our networks use, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container
from functools import partial

import torch
from torch import Tensor, nn

from gans.conversion.translation import Extra, Joined, Layout, Source
from gans.models.stylenat import BASE_SIZE, Generator, StyleNATGeneratorConfig
from gans.models.stylenat_discriminator import Discriminator
from gans.models.stylenat_layers import fir_kernel

TABLE = ".attn.rel_pos_bias"
INDEX_SIZE = BASE_SIZE**2


def key_minus_query_index() -> Tensor:
    """`(16, 16)` int64: for each query and key of the 4x4 map, both row by row, the row of a flat 7x7 table."""
    place = torch.arange(INDEX_SIZE)
    dy = place[None, :] // BASE_SIZE - place[:, None] // BASE_SIZE
    dx = place[None, :] % BASE_SIZE - place[:, None] % BASE_SIZE
    return (dy + BASE_SIZE - 1) * (2 * BASE_SIZE - 1) + dx + BASE_SIZE - 1


GENERATOR: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^mapping\.layers\.(\d+)\.", lambda match: f"style.{int(match[1]) + 1}."),
    (r"^input$", "input.input"),
    (r"^levels\.(\d+)\.to_rgb\.", r"to_rgbs.\1."),
    (r"^levels\.", "layers."),
    (r"\battn\.rel_pos_bias$", "attn.rpb"),
)
"""Our names to published ones."""

DISCRIMINATOR: tuple[tuple[str, str], ...] = (
    (r"^(scales\.\d+\.)?from_rgb\.conv\.", r"\1from_rgb.conv.0."),
    (r"^(scales\.\d+\.)?from_rgb\.activation\.", r"\1from_rgb.conv.1."),
    (r"^scales\.(\d+)\.from_rgb\.", r"from_rgbs.\1."),
    (r"^scales\.(\d+)\.conv1\.conv\.", r"convs.\1.conv1.0."),
    (r"^scales\.(\d+)\.conv1\.activation\.", r"convs.\1.conv1.1."),
    (r"^scales\.(\d+)\.conv2\.conv\.", r"convs.\1.conv2.1."),
    (r"^scales\.(\d+)\.conv2\.activation\.", r"convs.\1.conv2.2."),
    (r"^last_conv\.conv\.", "final_conv.0."),
    (r"^last_conv\.activation\.", "final_conv.1."),
    (r"^last_linear\.", "final_linear.0."),
    (r"^last_activation\.", "final_linear.1."),
    (r"^head\.", "final_linear.2."),
    (r"\.weight$", ".weight_orig"),
    (r"\.left_vector$", ".weight_u"),
    (r"\.right_vector$", ".weight_v"),
)
"""Our names to published ones; the last scale's from_rgb is counted by `_discriminator_sources`."""


def _renamed(name: str, replacements: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]) -> str:
    for pattern, replacement in replacements:
        name = re.sub(pattern, replacement, name)
    return name


def _table(
    name: str, shape: tuple[int, ...], level: int, config: StyleNATGeneratorConfig, names: Container[str]
) -> Source | Joined:
    """The table of a block: one of the 4x4 level, else one per partition (`.rpb.0`...), or in the files of 2022 one per
    half of the heads (`.rpb0` and `.rpb1`), also where both halves have the same dilation.
    """
    if level == 0:
        return Source(name, shape, torch.clone)
    heads, *offsets = shape
    halves = f"{name}0" in names
    partitions = 2 if halves else len(config.partitions[level - 1])
    share, rest = divmod(heads, partitions)
    sizes = [share + (i >= partitions - rest) for i in range(partitions)]
    first = name if halves else f"{name}."
    return Joined(tuple(Source(f"{first}{i}", (size, *offsets), torch.clone) for i, size in enumerate(sizes)))


def _generator_sources(model: Generator, names: Container[str]) -> dict[str, Source | Joined]:
    sources: dict[str, Source | Joined] = {}
    for ours, value in model.state_dict().items():
        name, shape = _renamed(ours, GENERATOR), tuple(value.shape)
        if ours.endswith(TABLE):
            sources[ours] = _table(name, shape, int(ours.split(".")[1]), model.config, names)
        elif ours == "input":
            sources[ours] = Source(name, (1, shape[3], *shape[1:3]), partial(torch.permute, dims=(0, 2, 3, 1)))
        else:
            sources[ours] = Source(name, shape, torch.clone)
    return sources


def _generator_extras(model: Generator) -> dict[str, Extra]:
    config, extras = model.config, {}
    for block in range(config.depth):
        name = f"layers.0.blocks.{block}.attn.relative_position_index"
        extras[name] = Extra((INDEX_SIZE, INDEX_SIZE), key_minus_query_index)
    for level in range(len(config.dims) - 1):
        extras[f"layers.{level}.upsample.sin_pos_embed._float_tensor"] = Extra((1,))
        extras[f"to_rgbs.{level}.upsample.kernel"] = Extra((4, 4), lambda: 4 * fir_kernel(torch.zeros(())))
    return extras


def _discriminator_sources(model: Discriminator) -> dict[str, Source | Joined]:
    last = f"from_rgbs.{len(model.scales)}."
    state = model.state_dict()
    names = {ours: re.sub(r"^from_rgb\.", last, _renamed(ours, DISCRIMINATOR)) for ours in state}
    return {ours: Source(names[ours], tuple(value.shape), torch.clone) for ours, value in state.items()}


def _haar_filter(rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """As published: upfirdn2d turns a filter around before it slides it over an image."""
    return torch.outer(torch.tensor(rows) / math.sqrt(2), torch.tensor(columns) / math.sqrt(2))


LOW, HIGH = (1, 1), (-1, 1)
HAAR = {"ll": (LOW, LOW), "lh": (HIGH, LOW), "hl": (LOW, HIGH), "hh": (HIGH, HIGH)}
"""Rows and columns of the published filters, by name."""


def _haar_extras(prefix: str, inverse: bool) -> dict[str, Extra]:
    def expected(band: str) -> Tensor:
        return _haar_filter(*HAAR[band]) * (-1 if inverse and band in ("lh", "hl") else 1)

    return {f"{prefix}.{band}": Extra((2, 2), partial(expected, band)) for band in HAAR}


def _discriminator_extras(model: Discriminator) -> dict[str, Extra]:
    blur = Extra((4, 4), lambda: fir_kernel(torch.zeros(())))
    extras = _haar_extras("dwt", inverse=False)
    for scale in range(len(model.scales)):
        extras[f"convs.{scale}.conv2.0.kernel"] = blur
        extras |= _haar_extras(f"from_rgbs.{scale + 1}.iwt", inverse=True)
        extras |= _haar_extras(f"from_rgbs.{scale + 1}.dwt", inverse=False)
        extras[f"from_rgbs.{scale + 1}.downsample.kernel"] = blur
    return extras


def _sources(model: nn.Module, names: Container[str]) -> dict[str, Source | Joined]:
    return _generator_sources(model, names) if isinstance(model, Generator) else _discriminator_sources(model)  # type: ignore[arg-type]


def _extras(model: nn.Module) -> dict[str, Extra]:
    return _generator_extras(model) if isinstance(model, Generator) else _discriminator_extras(model)  # type: ignore[arg-type]


STYLENAT = Layout(
    networks={
        "generator_ema": ("g_ema", "generator"),
        "generator": ("g", "generator"),
        "discriminator": ("d", "discriminator"),
    },
    ignored=frozenset(["args", "optim_dicts", "lr_dicts", "eval_info", "g_optim", "d_optim", "G_lr", "D_lr"]),
    sources=_sources,
    extras=_extras,
    nested="state_dicts",
    optional=frozenset(["generator", "discriminator"]),
)

LAYOUTS = {"stylenat-ffhq256": STYLENAT, "stylenat-ffhq1024": STYLENAT}
"""By preset."""
