"""Command line: `python -m gans train | presets | sample | figures`. Options are the configurations' fields."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from gans import checkpoint, logs
from gans.config import RunConfig, TrainConfig, from_dict, to_dict
from gans.images import grid, save_png
from gans.presets import PRESETS, preset
from gans.registry import build
from gans.train import NonFiniteError, choose_device, generate, train

USAGE = """usage: python -m gans COMMAND [options]

commands:
  train     train a recipe:  train --preset cifar10 --data FOLDER|ZIP --out DIR [any override]
  presets   list the recipes; with a name, print all of its settings
  sample    write a PNG from a checkpoint:  sample --checkpoint DIR --out FILE
  figures   draw a run's samples and curves:  figures --run DIR --out DIR

Each command explains its options with --help."""


@dataclass(frozen=True)
class TrainArguments:
    """Trains a recipe. Every setting of the preset can be overridden."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    recipe: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str = "cifar10"
    """Recipe to start from: cifar10, stl10, cifar10-small or digits."""
    dry_run: bool = False
    """Print the resolved settings and parameter counts as JSON, and stop."""


@dataclass(frozen=True)
class SampleArguments:
    """Writes a grid of images by the averaged generator of a checkpoint."""

    checkpoint: Path
    """A checkpoint folder, or the folder of a run for its newest."""
    out: Path
    """PNG file to write."""
    count: int = 64
    """Images."""
    seed: int = 0
    """Decides z."""
    scale: int = 1
    """Whole factor by which pixels are enlarged."""
    device: str = "auto"
    """"auto" or a torch device."""


@dataclass(frozen=True)
class FigureArguments:
    """Draws the development of a run's samples (`samples.png`) and its losses and distance (`curves.png`)."""

    run: Path
    """Folder of a run."""
    out: Path
    """Folder to write to."""
    steps: tuple[int, ...] = ()
    """Steps to show, of those that have a sample grid; all if none are given."""


def parse_train(arguments: list[str]) -> TrainArguments:
    """The arguments of `train`: the preset's values, overridden by whatever is given."""
    name = TrainArguments.preset
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--preset="):
            name = argument.removeprefix("--preset=")
    default = TrainArguments(run=RunConfig(data=tyro.MISSING, out=tyro.MISSING), recipe=preset(name), preset=name)
    return tyro.cli(TrainArguments, args=arguments, default=default, prog="python -m gans train")


def parameter_counts(recipe: TrainConfig) -> dict[str, int]:
    """Parameters of the generator and the discriminator, without allocating them."""
    with torch.device("meta"):
        models = {"generator": build(recipe.generator), "discriminator": build(recipe.discriminator)}
    return {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}


def run_train(arguments: list[str]) -> None:
    parsed = parse_train(arguments)
    if parsed.dry_run:
        counts = parameter_counts(parsed.recipe)
        shown = {"recipe": to_dict(parsed.recipe), "run": to_dict(parsed.run), "parameters": counts}
        print(json.dumps(shown, indent=2))
        return
    print(f"last checkpoint: {train(parsed.recipe, parsed.run)}")


def run_presets(arguments: list[str]) -> None:
    if arguments:
        print(json.dumps(to_dict(preset(arguments[0])), indent=2))
        return
    row = "{:<15}{:>9}{:>13}{:>13}{:>10}{:>11}{:>9}"
    print(row.format("preset", "image", "G params", "D params", "n_critic", "batch D/G", "steps"))
    for name, recipe in PRESETS.items():
        counts = parameter_counts(recipe)
        image = f"{recipe.generator.image_size}px x{recipe.generator.channels}"
        batch = f"{recipe.batch_d}/{recipe.batch_g}"
        numbers = (f"{count:,}" for count in counts.values())
        print(row.format(name, image, *numbers, recipe.n_critic, batch, recipe.steps))


def run_sample(arguments: list[str]) -> None:
    parsed = tyro.cli(SampleArguments, args=arguments, prog="python -m gans sample")
    path = parsed.checkpoint
    if (path / "checkpoints").is_dir():
        path = checkpoint.find("latest", path / "checkpoints") or path
    path = checkpoint.find(str(path), path)
    assert path is not None  # find raises where a named folder is no checkpoint
    config = from_dict(TrainConfig, checkpoint.load_config(path)["recipe"])
    device = choose_device(parsed.device)
    generator = build(config.generator)
    checkpoint.load_weights(path, "generator_ema", generator)
    images = generate(generator.eval().to(device), parsed.count, device, seed=parsed.seed)
    save_png(grid(images), parsed.out, scale=parsed.scale)
    print(f"wrote {parsed.out}")


def run_figures(arguments: list[str]) -> None:
    from gans.figures import plot_curves, plot_samples, sample_steps  # matplotlib takes a second to load

    parsed = tyro.cli(FigureArguments, args=arguments, prog="python -m gans figures")
    config = from_dict(TrainConfig, json.loads((parsed.run / "config.json").read_text())["recipe"])
    parsed.out.mkdir(parents=True, exist_ok=True)
    size = config.generator.image_size
    plot_samples(parsed.run, parsed.steps or sample_steps(parsed.run), size, parsed.out / "samples.png")
    plot_curves(logs.read(parsed.run), parsed.out / "curves.png")
    print(f"wrote {parsed.out / 'samples.png'} and {parsed.out / 'curves.png'}")


COMMANDS = {"train": run_train, "presets": run_presets, "sample": run_sample, "figures": run_figures}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status. Errors that a user can mend are one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        print(USAGE)
        return 0 if arguments and arguments[0] in ("-h", "--help", "help") else 2
    try:
        COMMANDS[arguments[0]](arguments[1:])
    except (ValueError, OSError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
