"""`python -m gans convert`: published checkpoints in the form that the other commands read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from gans.common.files import new_folder, save_tensors, sha256
from gans.conversion import layout_stylenat, layout_transgan
from gans.conversion.published import read_published
from gans.conversion.translation import convert
from gans.recipes.config import to_dict
from gans.recipes.named import preset
from gans.training import checkpoint

LAYOUTS = {**layout_transgan.LAYOUTS, **layout_stylenat.LAYOUTS}
"""The presets whose published checkpoints can be converted."""


@dataclass(frozen=True)
class ConvertArguments:
    """Converts a published checkpoint (.pth) into a folder that sample, interpolate and evaluate read.

    Only tensors and plain values are read from the file; code in it is never run.
    """

    checkpoint: Path
    """The published file."""
    preset: str
    """The recipe that it belongs to: cifar10, stl10... (`python -m gans presets`)."""
    out: Path
    """Folder to write; it must not exist."""


def run(arguments: list[str]) -> None:
    options = tyro.cli(ConvertArguments, args=arguments, prog="python -m gans convert")
    if options.preset not in LAYOUTS:
        raise ValueError(f"preset is {options.preset!r}; published checkpoints are known for {', '.join(LAYOUTS)}")
    recipe = preset(options.preset)
    content = read_published(options.checkpoint)
    with new_folder(options.out) as folder:
        for name, state in convert(content, recipe, LAYOUTS[options.preset]):
            save_tensors(state, folder / f"{name}.safetensors")
            print(f"{name}: {sum(value.numel() for value in state.values()):,} values")
        origin = {"file": options.checkpoint.name, "sha256": sha256(options.checkpoint), "preset": options.preset}
        config = {"recipe": to_dict(recipe), "converted_from": origin}
        (folder / checkpoint.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        checkpoint.write_checksums(folder)
    print(f"wrote {options.out}")
