"""`python -m gans.demo`: trains a small TransGAN on scanned digits and shows what came of it.

Writes into `--out`: `samples.png` (the samples' development from fixed z, and real images beside them),
`curves.png` (losses and the distance to the real data), `report.md` (the figures below as text) and the run
itself in `run/`.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from PIL import Image

import natten_ext
from gans import logs
from gans.config import RunConfig, TrainConfig
from gans.metrics import RandomFeatureFrechet
from gans.presets import DIGITS
from gans.profile import StepCost, measure_apart
from gans.train import choose_device, train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NEEDED_FALL = 5.0
"""How many times smaller the distance has to become for the demo to count as successful."""

METRIC_IMAGES = 1000
"""Real and generated images in a measurement of the distance."""

COST_RECIPE = replace(
    DIGITS,
    generator=replace(DIGITS.generator, base_size=8, windows=(8, 16, 32)),
    discriminator=replace(DIGITS.discriminator, image_size=32, patch_size=1, windows=(32, 16)),
    batch_d=4,
    batch_g=4,
)
"""The demo's networks at 32 px with single pixels as the finest patches: 1024 tokens in both."""


@dataclass(frozen=True)
class DemoArguments:
    """Trains a small TransGAN with fused attention under WGAN-GP on scikit-learn's scanned digits."""

    out: Path = Path("demo")
    """Folder to write to; a run of an earlier demo in it is replaced."""
    steps: int = DIGITS.steps
    """Generator steps."""
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    cost_batch: int = COST_RECIPE.batch_d
    """Batch size of the comparison of training steps."""


def read_tiles(path: Path, size: int, count: int) -> list[np.ndarray]:
    """The first `count` images of a sample grid."""
    grid = np.asarray(Image.open(path))
    columns = grid.shape[1] // size
    return [
        grid[i // columns * size : (i // columns + 1) * size, i % columns * size : (i % columns + 1) * size]
        for i in range(count)
    ]


def plot_samples(run: Path, steps: list[int], size: int, path: Path, columns: int = 12) -> None:
    """One row of samples per step from the same z, and a last row block of real images."""
    rows = [(f"step {step}", run / "samples" / f"step-{step:08d}.png", 0) for step in steps]
    rows += [("real", run / "samples" / "real.png", start) for start in (0, columns)]
    figure, axes = plt.subplots(len(rows), columns, figsize=(0.62 * columns + 1, 0.62 * len(rows) + 0.5), squeeze=False)
    for line, (label, grid, start) in zip(axes, rows, strict=True):
        for axis, tile in zip(line, read_tiles(grid, size, start + columns)[start:], strict=True):
            axis.imshow(tile, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("TransGAN on scanned digits: samples from fixed z, real images below", fontsize=10)
    figure.subplots_adjust(left=0.12, right=0.995, bottom=0.005, top=0.93, wspace=0.05, hspace=0.05)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curves(lines: list[dict[str, float]], path: Path) -> None:
    """Losses on the left, the distance to the real images with its floor on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, label in (
        ("discriminator/wasserstein", "D: E D(fake) - E D(real)"),
        ("discriminator/penalty", "D: gradient penalty"),
        ("generator/adversarial", "G: -E D(fake)"),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        left.plot(*zip(*points, strict=True), label=label, linewidth=1)
    left.set(title="loss terms", xlabel="generator step")
    left.legend(fontsize=8)
    points = [(line["step"], line["distance"]) for line in lines if "distance" in line]
    right.semilogy(*zip(*points, strict=True), marker=".", label="averaged generator")
    floor = next(line["floor"] for line in lines if "floor" in line)
    right.axhline(floor, color="gray", linestyle="--", label="real against real")
    right.set(title=f"{RandomFeatureFrechet.name} to real images", xlabel="generator step")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def fused_backend(device: torch.device) -> str:
    """The backend that "auto" takes for the demo's networks."""
    return next(status.name for status in natten_ext.backends(device, torch.float32, 16) if status.available)


def compare_costs(recipe: TrainConfig, device: str, threads: int) -> list[StepCost]:
    """One training step with the backend that "auto" takes, and with naive attention."""
    names = (fused_backend(choose_device(device)), "reference")
    return [measure_apart(recipe, backend=name, device=device, threads=threads) for name in names]


def cost_table(costs: list[StepCost]) -> str:
    """Markdown table of the costs, with the ratio to the last one (naive attention)."""
    naive = costs[-1]
    lines = ["| attention | backend | step, s | peak memory, MiB |", "| --- | --- | --- | --- |"]
    for label, cost in zip(("fused", "naive"), costs, strict=True):
        lines.append(f"| {label} | {cost.backend} | {cost.seconds:.2f} | {cost.peak_mib:.0f} |")
    fused = costs[0]
    lines.append(f"| naive / fused | | {naive.seconds / fused.seconds:.1f} | {naive.peak_mib / fused.peak_mib:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; exit status 1 if the distance did not fall enough."""
    options = tyro.cli(DemoArguments, args=arguments, prog="python -m gans.demo")
    started = time.perf_counter()
    out, run = options.out, options.out / "run"
    if run.exists():
        shutil.rmtree(run)
    device = choose_device(options.device)
    recipe = replace(DIGITS, steps=options.steps)
    sample_every = max(1, options.steps // 16)
    print(
        f"training a TransGAN on scikit-learn's digits: {recipe.steps} steps on {device}, "
        f"attention backend {fused_backend(device)!r}"
    )
    train(
        recipe,
        RunConfig(
            data="digits",
            out=str(run),
            device=options.device,
            threads=options.threads,
            log_every=max(1, options.steps // 100),
            sample_every=sample_every,
            metric_every=max(1, options.steps // 8),
            metric_images=METRIC_IMAGES,
            checkpoint_every=max(1, options.steps),
        ),
    )
    trained = time.perf_counter() - started

    lines = logs.read(run)
    shown = sorted({0, options.steps} | {i * sample_every for i in (1, 2, 4, 8, 12)})
    shown = [step for step in shown if (run / "samples" / f"step-{step:08d}.png").exists()]
    plot_samples(run, shown, recipe.generator.image_size, out / "samples.png")
    plot_curves(lines, out / "curves.png")

    print("measuring one training step with fused and with naive attention", flush=True)
    cost_recipe = replace(COST_RECIPE, batch_d=options.cost_batch, batch_g=options.cost_batch)
    table = cost_table(compare_costs(cost_recipe, options.device, options.threads))
    distances = [line for line in lines if "distance" in line]
    first, last = distances[0], distances[-1]
    fall = first["distance"] / last["distance"]
    report = f"""\
{RandomFeatureFrechet.name}, {recipe.steps} steps, {trained:.0f} s: \
{first["distance"]:.3g} -> {last["distance"]:.3g}, {fall:.1f} times smaller \
({"at least" if fall >= NEEDED_FALL else "NOT"} the {NEEDED_FALL:.0f} times that were to be reached); \
real against real {last["floor"]:.3g}

Training step (a D step with gradient penalty and a G step) of the demo's networks at 32x32 pixels with 1024
tokens in both, float32, batch {options.cost_batch}, {device}:

{table}
"""
    (out / "report.md").write_text(report)
    print(f"\n{report}\nwrote {out / 'samples.png'}, {out / 'curves.png'} and {out / 'report.md'}")
    print(f"total {time.perf_counter() - started:.0f} s")
    return 0 if fall >= NEEDED_FALL else 1


if __name__ == "__main__":
    sys.exit(main())
