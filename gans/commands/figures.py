"""`python -m gans figures`: a run's samples and curves as PNG."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from gans.evaluation.plots import plot_curves, plot_samples, sample_steps
from gans.recipes.config import RunConfig, TrainConfig, from_dict
from gans.training import logs


@dataclass(frozen=True)
class FigureArguments:
    """Draws the development of a run's samples (`samples.png`) and its losses and distance (`curves.png`)."""

    run: Path
    """Folder of a run."""
    out: Path
    """Folder to write to."""
    steps: tuple[int, ...] = ()
    """Steps to show, of those that have a sample grid; all if none are given."""


def run(arguments: list[str]) -> None:
    """Writes both figures."""
    parsed = tyro.cli(FigureArguments, args=arguments, prog="python -m gans figures")
    resolved = json.loads((parsed.run / "config.json").read_text())
    config, run_config = from_dict(TrainConfig, resolved["recipe"]), from_dict(RunConfig, resolved["run"])
    parsed.out.mkdir(parents=True, exist_ok=True)
    size = config.generator.image_size
    plot_samples(parsed.run, parsed.steps or sample_steps(parsed.run), size, parsed.out / "samples.png")
    network = run_config.metric.partition(":")[0]
    plot_curves(logs.read(parsed.run), parsed.out / "curves.png", f"distance ({network})")
    print(f"wrote {parsed.out / 'samples.png'} and {parsed.out / 'curves.png'}")
