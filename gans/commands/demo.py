"""`python -m gans demo`: trains a small TransGAN on scanned digits and shows what came of it.

Writes into `--out`: `samples.png` (the samples' development from fixed z, and real images beside them),
`curves.png` (losses and the distance to the real data), `report.md` (the figures below as text) and the run
itself in `run/`.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from gans.common.distributed import choose_device
from gans.evaluation.plots import plot_curves, plot_samples
from gans.recipes.config import RunConfig
from gans.recipes.presets_transgan import DIGITS
from gans.training import lock, logs
from gans.training.dry_run import describe
from gans.training.loop import train
from gans.training.profile import compare, cost_table

NEEDED_FALL = 5.0
"""How many times smaller the distance has to become for the demo to count as successful."""

DISTANCE = "Fréchet distance over random features"

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
    """Trains a small TransGAN with fused attention and R1 + R2 penalties on scikit-learn's scanned digits."""

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


def _clear(run: Path) -> None:
    """Deletes the run of an earlier demo; FileExistsError for a folder that is something else, or in use."""
    if not run.exists():
        return
    if not any((run / name).exists() for name in (lock.NAME, "config.json")):
        raise FileExistsError(f"{run} is not a run of this demo; give another --out")
    with lock.locked(run):
        shutil.rmtree(run)


def run(arguments: list[str]) -> int:
    """Runs the demo; exit status 1 if the distance did not fall enough."""
    options = tyro.cli(DemoArguments, args=arguments, prog="python -m gans demo")
    try:
        return _demo(options)
    except KeyboardInterrupt as error:
        error.args = ("interrupted; the next demo starts from the beginning",)  # whatever else it says, as its status
        raise


def _demo(options: DemoArguments) -> int:
    started = time.perf_counter()
    out, run = options.out, options.out / "run"
    _clear(run)
    device = choose_device(options.device)
    decay_start = options.steps * DIGITS.decay_start // DIGITS.steps
    recipe = replace(DIGITS, steps=options.steps, decay_start=decay_start, decay_end=options.steps)
    sample_every = max(1, options.steps // 16)
    settings = RunConfig(
        data="digits",
        out=str(run),
        device=options.device,
        threads=options.threads,
        log_every=max(1, options.steps // 100),
        sample_every=sample_every,
        metric_every=max(1, options.steps // 8),
        metric_images=METRIC_IMAGES,
        checkpoint_every=max(1, options.steps),
    )
    backends = sorted({row["backend"] for row in describe(recipe, settings)["attention"]})
    print(
        f"training a TransGAN on scikit-learn's digits: {recipe.steps} steps on {device}, "
        f"attention backend {', '.join(backends)}"
    )
    train(recipe, settings)
    trained = time.perf_counter() - started

    lines = logs.read(run)
    shown = [0, *(i * sample_every for i in (1, 2, 4, 8, 12)), options.steps]
    plot_samples(run, shown, recipe.generator.image_size, out / "samples.png")
    plot_curves(lines, out / "curves.png", DISTANCE)

    print("measuring one training step with fused and with naive attention", flush=True)
    cost_recipe = replace(COST_RECIPE, batch_d=options.cost_batch, batch_g=options.cost_batch)
    table = cost_table(compare(cost_recipe, device=options.device, threads=options.threads))
    distances = [line for line in lines if "distance" in line]
    first, last = distances[0], distances[-1]
    fall = first["distance"] / last["distance"]
    report = f"""\
{DISTANCE}, {recipe.steps} steps, {trained:.0f} s: \
{first["distance"]:.3g} -> {last["distance"]:.3g}, {fall:.1f} times smaller \
({"at least" if fall >= NEEDED_FALL else "NOT"} the {NEEDED_FALL:.0f} times that were to be reached); \
real against real {last["floor"]:.3g}

Training step (a D step with its penalties and a G step) of the demo's networks at 32x32 pixels with 1024
tokens in both, float32, batch {options.cost_batch}, {device}:

{table}
"""
    (out / "report.md").write_text(report)
    print(f"\n{report}\nwrote {out / 'samples.png'}, {out / 'curves.png'} and {out / 'report.md'}")
    print(f"total {time.perf_counter() - started:.0f} s")
    return 0 if fall >= NEEDED_FALL else 1
