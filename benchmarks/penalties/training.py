"""Training in small, without files: what the study's discriminators learn from, and runs at equal processor time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from gans.common.distributed import World
from gans.data.loading import load_images
from gans.data.sources import open_source
from gans.evaluation.metrics import make_metric
from gans.losses.penalties import PenaltyMode
from gans.models.ema import EMA
from gans.recipes.config import TrainConfig
from gans.training.monitor import generate
from gans.training.steps import discriminator_step, generator_step, make_networks

MEASURED = 1000  # images of a distance


def digits(size: int) -> Tensor:
    """scikit-learn's scanned digits, grey, `(1797, 1, size, size)` in [-1, 1]."""
    source = open_source("digits")
    return load_images(source, size=size, channels=1, limit=len(source))


class Training:
    """A recipe's steps, one after the other, on images in memory, in random order."""

    def __init__(self, recipe: TrainConfig, images: Tensor) -> None:
        self.recipe, self.images, self.step = recipe, images, 0
        self.networks = make_networks(recipe, images.device)
        self.average = EMA(self.networks.generator, recipe.ema)
        self._world = World(images.device)
        self._order = torch.Generator().manual_seed(recipe.seed)

    def advance(self) -> None:
        recipe = self.recipe
        for index in range(recipe.n_critic):
            discriminator_step(self.step, index, recipe, self.networks, self._real(recipe.batch_d), self._world)
        real = self._real(recipe.batch_g) if self.networks.loss.uses_real else None
        generator_step(self.step, recipe, self.networks, real, self._world)
        self.step += 1
        batch = recipe.batch_g
        self.average.update(self.networks.generator, images=self.step * batch, batch=batch)

    def _real(self, count: int) -> Tensor:
        return self.images[torch.randint(len(self.images), (count,), generator=self._order)]


@dataclass(frozen=True)
class Point:
    """Where a run stands. ``seconds`` are those of the processor, spent in updates alone."""

    mode: PenaltyMode
    seed: int
    seconds: float
    step: int
    distance: float


def curve(recipe: TrainConfig, mode: PenaltyMode, seed: int, seconds: float, points: int) -> list[dict[str, float]]:
    """The recipe with this penalty for so many processor seconds, and its distance to the digits on the way."""
    recipe = replace(recipe, seed=seed, loss=replace(recipe.loss, penalty_mode=mode))
    images = digits(recipe.generator.image_size)
    metric = make_metric("random", images[:MEASURED])
    training, spent, found = Training(recipe, images), 0.0, []
    for point in range(1, points + 1):
        while spent < seconds * point / points:
            start = time.process_time()
            training.advance()
            spent += time.process_time() - start
        distance = metric(generate(training.average.model, MEASURED).clamp(-1, 1))
        found.append(asdict(Point(mode, seed, round(spent, 2), training.step, distance)))
    return found
