"""`python -m gans presets`: the recipes, or all settings of one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from gans.recipes.config import to_dict
from gans.recipes.named import PRESETS, preset
from gans.training.dry_run import parameter_counts


@dataclass(frozen=True)
class PresetArguments:
    """Lists the recipes: "published" ones repeat published settings, "ours" follow their rules at another size."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """A recipe whose settings to print as JSON."""


def run(arguments: list[str]) -> None:
    """Prints a table, or one recipe as JSON."""
    parsed = tyro.cli(PresetArguments, args=arguments, prog="python -m gans presets")
    if parsed.name:
        print(json.dumps(to_dict(preset(parsed.name)), indent=2))
        return
    row = f"{{:<{max(map(len, PRESETS)) + 2}}}" + "{:<11}{:>9}{:>13}{:>13}{:>10}{:>11}{:>9}  {}"
    print(row.format("preset", "origin", "image", "G params", "D params", "n_critic", "batch D/G", "steps", "note"))
    for name, entry in PRESETS.items():
        recipe = entry.recipe
        counts = (f"{count:,}" for count in parameter_counts(recipe).values())
        image = f"{recipe.generator.image_size}px x{recipe.generator.channels}"
        batch = f"{recipe.batch_d}/{recipe.batch_g}"
        print(row.format(name, entry.origin, image, *counts, recipe.n_critic, batch, recipe.steps, entry.note))
