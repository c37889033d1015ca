"""What fused attention gains in training on a GPU: steps of published recipes, then a small model for the rest.

    python -m benchmarks.gpu_train --out DIR --data cifar10-train.zip

Each step is measured in a process of its own (``gans.training.profile``): TransGAN ``cifar10`` and ``church256`` with
WGAN-GP, ViTGAN with R1, StyleNAT ``stylenat-ffhq256``; with fused and with naive attention, and, where the penalty has
one, with its estimate by finite differences. What is left of the time trains ``--preset`` on ``--data`` with fused
attention. DIR gets ``gpu_train.json`` and ``gpu_train.md``, whole at any time, and the training run in ``run/``.
``--device cpu`` tries it in small, without a GPU.

Exit status: 0; 1 if something failed; 2 for arguments that make no sense. What did not fit in the time is no failure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.environment import describe_environment
from benchmarks.gpu.processes import Process, left
from benchmarks.record import output_folder, write_whole
from gans.recipes.config import TrainConfig
from gans.recipes.named import PRESETS, preset
from gans.training.profile import Update, measure_apart


@dataclass(frozen=True)
class Step:
    """``penalties``: the ways to take the discriminator's penalty that are compared."""

    preset: str
    update: Update
    batch: int
    penalties: tuple[str, ...] = ("exact",)

    def recipe(self, penalty: str) -> TrainConfig:
        recipe = replace(preset(self.preset), batch_d=self.batch, batch_g=self.batch, accumulate=1)
        # Lazy penalties would stand in some of the steps alone.
        return replace(recipe, loss=replace(recipe.loss, penalty_mode=penalty, penalty_every=1))


BOTH = ("exact", "finite-difference")
STEPS = (
    Step("cifar10", "discriminator", 64),
    Step("vitgan32", "discriminator", 128, BOTH),
    Step("church256", "discriminator", 16),
    Step("stylenat-ffhq256", "generator", 8),
    Step("stylenat-ffhq256", "discriminator", 8, BOTH),
)
SMALL_STEPS = (Step("digits", "discriminator", 2), Step("vitgan32-small", "discriminator", 2, BOTH))
STEP_LIMIT = 60.0  # seconds of one step's process
TRAIN_SHARE = 0.4  # of the time that measuring leaves to training, at least


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=output_folder, required=True, metavar="DIR", help="made if need be; must have no run/ yet")
    add("--data", default="digits", help="what is trained on, as in `gans train` (default digits)")
    add("--preset", default="cifar10-small", choices=PRESETS, metavar="NAME", help="what is trained")
    add("--minutes", type=float, default=5.0, help="time for everything (default 5)")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--precision", default="", help="fp32 or bf16 of the measured steps; default: the recipe's")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if (options.out / "run").exists():
        parser.error(f"--out: {options.out / 'run'} is there already")
    return options


def main(arguments: list[str] | None = None, steps: tuple[Step, ...] | None = None) -> int:
    """Measure, then train; returns the exit status."""
    options = parse(arguments)
    out, end = options.out.resolve(), time.monotonic() + 60 * options.minutes
    steps = steps or (STEPS if options.device == "cuda" else SMALL_STEPS)
    result = {"environment": describe_environment(torch.device(options.device), torch.float32), "steps": []}
    result["arguments"] = {name: str(value) for name, value in vars(options).items()}

    def save() -> None:
        write_whole(out / "gpu_train.json", json.dumps(result, indent=1) + "\n")
        write_whole(out / "gpu_train.md", page(result))

    measuring_ends = end - TRAIN_SHARE * 60 * options.minutes
    for step in steps:
        for penalty in step.penalties:
            for backend in ("auto", "reference"):
                result["steps"].append(_measure(step, penalty, backend, options, left(measuring_ends)))
                save()
                print(_line(result["steps"][-1]), flush=True)
    result["training"] = _train(options, out, left(end))
    save()
    print(result["training"]["summary"], f"\nwritten: {out / 'gpu_train.json'}, gpu_train.md, run/")
    failed = [*result["steps"], result["training"]]
    return 1 if any(entry.get("error") for entry in failed) else 0


def _measure(step: Step, penalty: str, backend: str, options: argparse.Namespace, seconds: float) -> dict:
    recipe = step.recipe(penalty)
    if options.precision:
        recipe = replace(recipe, precision=options.precision)
    entry = {"preset": step.preset, "update": step.update, "batch": step.batch, "precision": recipe.precision}
    entry |= {"penalty": penalty, "attention": "naive" if backend == "reference" else "fused"}
    if seconds < 1:
        return entry | {"skipped": "out of time"}
    try:
        cost = measure_apart(
            recipe, backend=backend, device=options.device, update=step.update, limit=min(seconds, STEP_LIMIT)
        )
    except TimeoutError:
        return entry | {"skipped": "out of time"}
    except RuntimeError as error:
        text = str(error).strip().splitlines()[-1][:300]
        # Naive attention that does not fit is a result.
        return entry | {"skipped" if "out of memory" in text.lower() else "error": text}
    return entry | asdict(cost)


def _train(options: argparse.Namespace, out: Path, seconds: float) -> dict:
    command = [
        sys.executable, "-m", "gans", "train", "--preset", options.preset, "--data", options.data, "--out", out / "run",
        "--device", options.device, "--steps", 10**6, "--metric-every", 100, "--sample-every", 100,
    ]  # fmt: skip
    process = Process(command, out / "train.log")
    ended = process.wait(seconds)
    if ended.status is not None:
        return {"error": ended.reason or "it ended by itself", "summary": f"training ended early: {ended.reason}"}
    return {"summary": f"trained {options.preset} for {seconds:.0f} s: {out / 'run'}"}


def page(result: dict) -> str:
    """The table that a reader wants first."""
    told = result["environment"]
    lines = [
        (
            f"{e['preset']}, {e['update']}", e["batch"], e["precision"], e["penalty"], e["attention"],
            e.get("backend", e.get("skipped", e.get("error"))), *_numbers(e),
        )
        for e in result["steps"]
    ]  # fmt: skip
    header = ("step", "batch", "precision", "penalty", "attention", "backend", "ms", "images/s", "peak memory, MiB")
    where = f"{told.get('gpu', told['cpu'])}, torch {told['torch']}, commit {told['commit']}"
    training = result.get("training", {}).get("summary", "")
    return f"# gpu_train\n\n{where}\n\n{tables.table(header, lines)}\n\n{training}\n"


def _numbers(entry: dict) -> tuple[str, str, str]:
    if "seconds" not in entry:
        return "-", "-", "-"
    seconds = entry["seconds"]
    return f"{1e3 * seconds:.1f}", f"{entry['batch'] / seconds:.1f}", f"{entry['peak_mib']:.0f}"


def _line(entry: dict) -> str:
    names = ("preset", "update", "penalty", "attention")
    milliseconds, images, memory = _numbers(entry)
    said = entry.get("error") or entry.get("skipped") or f"{milliseconds} ms, {images} images/s, {memory} MiB"
    return f"{', '.join(entry[name] for name in names)}: {said}"


if __name__ == "__main__":
    sys.exit(main())
