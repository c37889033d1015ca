"""Exponential moving average of a model's weights, buffers included."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from gans.models.spectral_norm import begin_step


@dataclass(frozen=True)
class EMAConfig:
    """How fast the average forgets; the defaults are TransGAN's CIFAR-10 settings."""

    decay: float | None = None
    """A constant decay per generator step (published 256-pixel runs: 0.995); None uses the half-life below."""
    half_life: int = 500_000
    """Images that the generator makes in training until a weight counts half."""
    rampup: float = 0.1
    """The half-life is at most this times the images made so far, so the first weights are soon forgotten."""

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; it must be in [0, 1)")
        if self.half_life < 1 or self.rampup <= 0:
            raise ValueError(f"ema.half_life ({self.half_life}) and ema.rampup ({self.rampup}) must be positive")


class EMA:
    """Keeps `self.model`, an averaged copy in evaluation mode without gradients, of a model under training."""

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay(self, images: int, batch: int) -> float:
        """Decay of one step that makes `batch` images and brings their number to `images`."""
        if self.config.decay is not None:
            return self.config.decay
        return 0.5 ** (batch / min(self.config.half_life, max(self.config.rampup * images, 1e-8)))

    @torch.no_grad()
    def update(self, model: nn.Module, *, images: int, batch: int) -> None:
        """Moves the average towards `model`; integer buffers are copied, and spectral norms follow the average."""
        weight = 1 - self.decay(images, batch)
        for average, current in zip(_tensors(self.model), _tensors(model), strict=True):
            if average.is_floating_point():
                average.lerp_(current, weight)
            else:
                average.copy_(current)
        begin_step(self.model)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, but for those that `begin_step` moves: an average of unit vectors is shorter than 1, and
    a weight over a norm that was estimated with it too large.
    """
    moving = (module for module in model.modules() if hasattr(module, "begin_step"))
    left_out = {id(buffer) for module in moving for buffer in module.buffers(recurse=False)}
    return [*model.parameters(), *(buffer for buffer in model.buffers() if id(buffer) not in left_out)]
