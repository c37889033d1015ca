"""`python -m gans figures`: a run's samples and curves as PNG."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from gans.data.images import to_uint8
from gans.data.loading import load_images
from gans.data.sources import open_source
from gans.evaluation.plots import plot_curves, plot_neighbours, plot_samples, read_tiles, sample_steps
from gans.evaluation.report import write_report
from gans.recipes.config import RunConfig, TrainConfig, from_dict
from gans.training import logs


@dataclass(frozen=True)
class FigureArguments:
    """Draws the development of a run's samples (`samples.png`) and its losses and distance (`curves.png`), and writes
    all of the run on a page (`report.html`); with `--neighbours`, the real images nearest to the last samples as well
    (`neighbours.png`).
    """

    run: Path
    """Folder of a run."""
    out: Path
    """Folder to write to."""
    steps: tuple[int, ...] = ()
    """Steps to show, of those that have a sample grid; all if none are given."""
    neighbours: int = 0
    """How many samples to look up among all real images, pixel by pixel; 0 for none."""

    def __post_init__(self) -> None:
        if self.neighbours < 0:
            raise ValueError(f"neighbours is {self.neighbours}; it cannot be negative")


def _config_of(run: Path) -> dict[str, Any]:
    """What a run was started with; ValueError for a folder that is no run's, say an export."""
    path = run / "config.json"
    resolved = json.loads(path.read_text()) if path.is_file() else {}
    if not {"recipe", "run"} <= resolved.keys():
        raise ValueError(f"run is {str(run)!r}, which is not the folder of a run")
    return resolved


def run(arguments: list[str]) -> None:
    """Writes figures and page."""
    parsed = tyro.cli(FigureArguments, args=arguments, prog="python -m gans figures")
    resolved = _config_of(parsed.run)
    config, run_config = from_dict(TrainConfig, resolved["recipe"]), from_dict(RunConfig, resolved["run"])
    parsed.out.mkdir(parents=True, exist_ok=True)
    size = config.generator.image_size
    steps = parsed.steps or tuple(sample_steps(parsed.run))
    plot_samples(parsed.run, steps, size, parsed.out / "samples.png")
    network = run_config.metric.partition(":")[0]
    lines = logs.read(parsed.run)
    plot_curves(lines, parsed.out / "curves.png", f"distance ({network})")
    write_report(parsed.run, lines, parsed.out / "curves.png", parsed.out / "report.html")
    print(f"wrote {', '.join(str(parsed.out / name) for name in ('samples.png', 'curves.png', 'report.html'))}")
    if parsed.neighbours:
        source = open_source(run_config.data, config.images.split)
        channels, broken = config.generator.channels, config.images.broken
        real = to_uint8(load_images(source, size=size, channels=channels, limit=len(source), broken=broken))
        tiles = read_tiles(parsed.run / "samples" / f"step-{max(steps):08d}.png", size)[: parsed.neighbours]
        plot_neighbours(tiles, real.squeeze(-1) if channels == 1 else real, parsed.out / "neighbours.png")
        print(f"wrote {parsed.out / 'neighbours.png'}")
