"""A run on one page: `report.html`, which needs no other file and no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from gans.data.images import data_uri
from gans.evaluation import metrics
from gans.evaluation.plots import read_tiles, sample_steps
from gans.recipes.config import TrainConfig, from_dict

STRIP_STEPS = 8
"""Rows of the strip of samples, besides the real images."""
STRIP_COLUMNS = 12
"""Images of a row."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; vertical-align: top; }
.numbers td { font-variant-numeric: tabular-nums; text-align: right; } .numbers th { text-align: right; }
.strip img { display: block; height: 3.4rem; image-rendering: pixelated; } .strip td { padding: .1rem .8rem .1rem 0; }
.grid img { image-rendering: pixelated; min-width: 24rem; max-width: 100%; }
.curves { background: white; } .curves img { width: 100%; }
code { font-size: .9em; overflow-wrap: anywhere; }
</style>
<h1>{{ title }}</h1>
<p>{{ subtitle }}</p>
<table>
{% for name, value in summary %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>
<h2>Samples</h2>
<p>Always from the same latents, not chosen; the averaged generator's.</p>
<table class="strip">
{% for label, image in strip %}<tr><th>{{ label }}</th><td><img src="{{ image }}" alt="{{ label }}"></td></tr>
{% endfor %}</table>
{% if curves %}<h2>Curves</h2>
<div class="curves"><img src="{{ curves }}" alt="losses and distance by step"></div>
{% endif %}{% if distances %}<h2>Distance to real images</h2>
<p>Network: {{ metric }}. The floor is the distance between two halves of the real images.</p>
<table class="numbers"><tr><th>step</th><th>distance</th><th>floor</th><th>times the floor</th></tr>
{% for line in distances %}<tr><td>{{ "{:,}".format(line.step) }}</td><td>{{ "%.4g" | format(line.distance) }}</td>
<td>{{ "%.4g" | format(line.floor) }}</td><td>{{ "%.3g" | format(line.distance / line.floor) }}</td></tr>
{% endfor %}</table>
{% endif %}<h2>All samples of step {{ "{:,}".format(last) }}</h2>
<div class="grid"><img src="{{ grid }}" alt="samples"></div>
<h2>Settings</h2>
<details open><summary>{{ settings | length }} settings</summary>
<table>
{% for name, value in settings %}<tr><th><code>{{ name }}</code></th><td><code>{{ value }}</code></td></tr>
{% endfor %}</table>
</details>
</html>
"""


def write_report(run: Path, lines: Sequence[dict[str, float]], curves: Path, path: Path) -> None:
    """Writes the page of the run in the folder `run` to `path`. `lines` are its log's, `curves` is the file to which
    `plot_curves` has drawn them.

    Raises FileNotFoundError where the folder has no `config.json` or no samples.
    """
    resolved = json.loads((run / "config.json").read_text())
    recipe, steps = resolved["recipe"], sample_steps(run)
    if not steps:
        raise FileNotFoundError(f"run {str(run)!r} has no samples to show")
    size = from_dict(TrainConfig, recipe).generator.image_size
    means = [line for line in lines if "images_per_second" in line]
    distances = metrics.distances(lines)
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    text = page.render(
        title=run.resolve().name,
        subtitle=f"{recipe['generator']['kind']} against {recipe['discriminator']['kind']}, {resolved['run']['data']}",
        summary=list(_summary(resolved, means, distances)),
        strip=[(label, data_uri(image)) for label, image in _strip(run, steps, size)],
        curves=data_uri(Image.open(curves)) if means else "",
        distances=distances,
        metric=resolved["run"]["metric"],
        last=steps[-1],
        grid=data_uri(Image.open(run / "samples" / f"step-{steps[-1]:08d}.png")),
        settings=[*_flat(recipe), *_flat({"run": resolved["run"]})],
    )
    path.write_text(text, encoding="utf-8")


def training_seconds(means: Sequence[dict[str, float]]) -> float:
    """The time that the steps in these lines took, also where the run was interrupted in between."""
    seconds, before = 0.0, 0.0
    for line in means:
        if line["real_images"] > before:
            seconds += (line["real_images"] - before) / line["images_per_second"]
        before = line["real_images"]
    return seconds


def _summary(resolved: dict[str, Any], means: Sequence[dict[str, float]], distances: Sequence[dict[str, float]]) -> Any:
    for name, count in resolved["parameters"].items():
        if name != "generator_ema":
            yield f"parameters, {name}", f"{count:,}"
    yield "device", f"{resolved['device']}, {resolved['threads']} threads, {resolved['processes']} processes"
    yield "versions", ", ".join(f"{name} {version}" for name, version in resolved["versions"].items())
    if resolved.get("classes"):
        yield "classes", f"{len(resolved['classes'])}: {', '.join(resolved['classes'][:12])}"
    if means:
        last, seconds = means[-1], training_seconds(means)
        yield "steps", f"{last['step']:,} of {resolved['recipe']['steps']:,}"
        yield "real images seen", f"{last['real_images']:,}"
        yield (
            "time",
            f"{seconds / 60:.1f} minutes, {1000 * seconds / max(last['real_images'], 1):.3g} s per thousand images",
        )
        yield "memory", f"{max(line['memory_mib'] for line in means):,.0f} MiB at most"
        yield "updates left out", f"{last['skipped']:,}"
    if distances:
        best, last = min(distances, key=lambda line: line["distance"]), distances[-1]
        yield "last distance", f"{last['distance']:.4g}, {last['distance'] / last['floor']:.3g} times the floor"
        yield "best distance", f"{best['distance']:.4g} at step {best['step']:,}"


def _strip(run: Path, steps: Sequence[int], size: int) -> Iterator[tuple[str, Image.Image]]:
    """The first samples of some steps, evenly spread, and as many real images."""
    places = np.linspace(0, len(steps) - 1, min(len(steps), STRIP_STEPS)).round().astype(int)
    names = {f"step {steps[place]:,}": f"step-{steps[place]:08d}.png" for place in places} | {"real": "real.png"}
    for label, name in names.items():
        if (run / "samples" / name).exists():
            yield (
                label,
                Image.fromarray(np.concatenate(read_tiles(run / "samples" / name, size)[:STRIP_COLUMNS], axis=1)),
            )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
