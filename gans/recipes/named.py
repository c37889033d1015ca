"""Named recipes. `python -m gans presets` lists them. Each model has a module of its own."""

from __future__ import annotations

from gans.recipes import presets_gat, presets_projected, presets_stylenat, presets_transgan, presets_vitgan
from gans.recipes.config import Preset, TrainConfig

PRESETS: dict[str, Preset] = {
    **presets_transgan.PRESETS,
    **presets_vitgan.PRESETS,
    **presets_stylenat.PRESETS,
    **presets_projected.PRESETS,
    **presets_gat.PRESETS,
}


def preset(name: str) -> TrainConfig:
    """The recipe called `name`; ValueError for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name].recipe
