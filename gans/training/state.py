"""What training changes: weights, average, optimisers, counters. Saved and restored as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gans.models.ema import EMA
from gans.training import checkpoint
from gans.training.steps import Networks


@dataclass
class TrainState:
    """The state of a run between two steps."""

    networks: Networks
    average: EMA
    step: int = 0
    """Generator steps taken."""
    position: int = 0
    """Images taken from the endless stream of real ones."""
    skipped: int = 0
    """Updates that were left out because something was not finite."""
    idle_probability: float = 0.0
    """The probability of adaptive augmentation while it is switched off, for a later run that has it again."""

    def models(self) -> dict[str, nn.Module]:
        """Everything with weights, by the name of its file in a checkpoint."""
        found = {
            "generator": self.networks.generator,
            "generator_ema": self.average.model,
            "discriminator": self.networks.discriminator,
        }
        loss = self.networks.loss
        return found | {"loss": loss} if isinstance(loss, nn.Module) and loss.state_dict() else found

    def not_finite(self) -> str | None:
        """The name of a weight or buffer that is not finite, if there is one."""
        for name, model in self.models().items():
            for key, value in model.state_dict().items():
                if not value.isfinite().all():
                    return f"{name}.{key}"
        return None

    def save(self, root: Path, *, images: int, config: Mapping[str, Any], keep: int, best: bool = False) -> Path:
        """Writes a checkpoint into `root` and returns its path; see `gans.training.checkpoint.save`."""
        state = {
            "step": self.step,
            "position": self.position,
            "images": images,
            "skipped": self.skipped,
            "optimizer_g": self.networks.optimizer_g.state_dict(),
            "optimizer_d": self.networks.optimizer_d.state_dict(),
            "rng": checkpoint.rng_state(),
            "augment_probability": self.networks.ada.probability if self.networks.ada else self.idle_probability,
        }
        return checkpoint.save(root, self.step, models=self.models(), state=state, config=config, keep=keep, best=best)

    def restore(self, path: Path, *, images: int) -> None:
        """Continues from a checkpoint; ValueError if it was made with another number of real images."""
        state = checkpoint.load_state(path)
        if state["images"] != images:
            raise ValueError(f"data has {images} images; {path} was made with {state['images']}")
        for name, model in self.models().items():
            checkpoint.load_weights(path, name, model)
        self.networks.optimizer_g.load_state_dict(state["optimizer_g"])
        self.networks.optimizer_d.load_state_dict(state["optimizer_d"])
        self.step, self.position, self.skipped = state["step"], state["position"], state["skipped"]
        checkpoint.set_rng_state(state["rng"])
        self.idle_probability = state.get("augment_probability", 0.0)
        if self.networks.ada:
            self.networks.ada.probability = self.idle_probability
