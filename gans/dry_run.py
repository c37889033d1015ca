"""What a recipe needs, without running it."""

from __future__ import annotations

import torch

from gans.config import TrainConfig
from gans.registry import build


def parameter_counts(recipe: TrainConfig) -> dict[str, int]:
    """Parameters of the generator and the discriminator, without allocating them."""
    with torch.device("meta"):
        models = {"generator": build(recipe.generator), "discriminator": build(recipe.discriminator)}
    return {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
