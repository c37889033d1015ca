"""Where a run starts from: afresh, or from a checkpoint, with what may differ from the run that wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gans.recipes.config import RunConfig, TrainConfig, differences, from_dict, to_dict
from gans.training import checkpoint

FREE = frozenset({"steps", "accumulate", "images.workers", "images.broken"})
"""Recipe fields that change the weights to come by rounding, or not at all."""

CHANGEABLE = frozenset(
    {
        *("lr_d", "lr_g", "warmup", "decay_start", "decay_end", "decay_to", "clip"),
        *("precision", "penalty_precision", "penalty_update", "ema.decay", "ema.half_life", "ema.rampup"),
        *("ada.target", "ada.images"),
        *("loss.gp_weight", "loss.gp_target", "loss.drift", "loss.r1", "loss.r2"),
        *("loss.penalty_every", "loss.penalty_mode", "loss.penalty_sigma"),
        *("loss.out_of_range", "loss.bcr_real", "loss.bcr_fake"),
        *("loss.path_length", "loss.path_length_every", "loss.path_length_decay"),
    }
)
"""Recipe fields that fit every checkpoint: changing them is another recipe from here on, which the log says."""


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    checkpoint: Path | None = None
    """None for the beginning."""
    changed: dict[str, str] = field(default_factory=dict)
    """The settings, of recipe and run, that differ from the checkpoint's, each with its "old -> new"."""

    def describe(self) -> dict[str, Any]:
        """As values for JSON, for the log."""
        return {"checkpoint": str(self.checkpoint) if self.checkpoint else None, "changed": self.changed}

    @property
    def relearned(self) -> dict[str, str]:
        """Those of them that change what is learned."""
        return {name: change for name, change in self.changed.items() if name in CHANGEABLE}


def find_start(config: TrainConfig, run: RunConfig, root: Path) -> Start:
    """Where a run with checkpoints in `root` starts from.

    Raises FileExistsError where `root` holds checkpoints that nobody asked to continue, and ValueError for a
    checkpoint that is damaged or has a recipe that this one cannot continue.
    """
    if not run.resume:
        if checkpoint.holds_run(root):
            raise FileExistsError(f"out {run.out!r} holds a run; continue it with resume 'latest' or give another out")
        return Start()
    path = checkpoint.find(run.resume, root)
    if path is None:
        return Start()
    if path.parent.resolve() != root.resolve() and (step := checkpoint.load_state(path)["step"]) >= config.steps:
        raise ValueError(f"cannot resume {path} in another out: it is at step {step}, and steps is {config.steps}")
    saved = checkpoint.load_config(path)
    recipe = to_dict(from_dict(TrainConfig, saved["recipe"]))
    changed = differences(recipe, to_dict(config))
    refused = [f"{name} ({change})" for name, change in changed.items() if name not in FREE | CHANGEABLE]
    if refused:
        raise ValueError(f"cannot resume {path} with another recipe; it differs in {', '.join(refused)}")
    places = {"data": run.data, "out": run.out, "resume": run.resume}
    defaults = to_dict(RunConfig(data=run.data, out=run.out))  # of options that are younger than the checkpoint
    changed |= differences(defaults | saved["run"] | places, to_dict(run))
    return Start(path, changed)


def refuse_later(root: Path, start: Path, step: int) -> None:
    """ValueError where `root` has checkpoints of later steps than that of `start`: which of them would be the run's?"""
    if later := [path.name for path in checkpoint.list_checkpoints(root) if checkpoint.step_of(path) > step]:
        raise ValueError(f"cannot resume {start}: {root} has later checkpoints ({', '.join(later)}); move them away")


def check_classes(path: Path, classes: Sequence[str], data: str) -> None:
    """ValueError where the networks of a checkpoint know the classes of `data` by other names, or in another order."""
    before = checkpoint.load_config(path).get("classes", classes)
    if other := [(i, *names) for i, names in enumerate(zip(before, classes, strict=True)) if names[0] != names[1]]:
        number, then, now = other[0]
        raise ValueError(
            f"data {data!r} has other classes than {path} was made with: class {number} is {now!r}, and was {then!r}"
        )
