"""The latent of a given image: by gradient descent, so that a generator's image comes near to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.common import rng
from gans.features.network import MapNetwork, resize, with_channels

FEATURE_SIZE = 128
"""Smaller images are enlarged to this side for the feature network."""
STARTS = 256
"""Random latents among which a projection in z begins with the nearest, and that tell how far w spreads."""


@dataclass(frozen=True)
class ProjectionConfig:
    """How an image is projected; the schedules are those of StyleGAN2's projector."""

    steps: int = 500
    """Steps of Adam."""
    lr: float = 0.1
    """Adam's learning rate, which rises over the first twentieth and falls to 0 over the last quarter."""
    noise: float = 0.05
    """Noise that is added to w at first, over w's spread; it falls to 0 over three quarters of the steps."""
    pixels: float = 1.0
    """Weight of the mean squared difference of the pixels."""
    features: float = 1.0
    """Weight of the difference of the feature network's maps."""
    every_block: bool = False
    """Whether each block gets a w of its own (W+): nearer to the image, further from what the generator makes."""
    seed: int = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        if not 0 < self.lr < math.inf:  # nor NaN
            raise ValueError(f"lr is {self.lr}; it must be positive and finite")
        for name in ("noise", "pixels", "features"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be finite and not negative")
        if not self.pixels and not self.features:
            raise ValueError("pixels and features are 0; one of them must be positive")


@dataclass
class Projection:
    """What `project` found."""

    space: Literal["z", "w"]
    code: Tensor
    """z `(1, latent_dim)`, w `(1, style_dim)` or with `every_block` `(1, blocks, style_dim)`."""
    image: Tensor
    """The generator's image of it, `(1, C, S, S)`."""
    losses: list[float]
    """The loss of every step."""


def feature_distance(network: MapNetwork) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean squared distance of two images' maps, whose channels are scaled to unit length at each place: LPIPS
    (Zhang et al. 2018, arXiv 1801.03924) without learned weights.
    """

    def maps(images: Tensor) -> list[Tensor]:
        size = max(FEATURE_SIZE, 32 * math.ceil(images.shape[-1] / 32))
        return [F.normalize(found, dim=1) for found in network(resize(with_channels(images, 3), size))]

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(x - y).square().sum(1).mean() for x, y in zip(maps(a), maps(b), strict=True)]).mean()

    return distance


def project(
    generator: Any,
    target: Tensor,
    config: ProjectionConfig,
    *,
    features: MapNetwork | None = None,
    report: Callable[[int, float, Tensor], None] = lambda step, loss, image: None,
) -> Projection:
    """Looks for the latent whose image is nearest to `target` `(1, C, S, S)` in [-1, 1].

    In w from the mean w for a generator with a mapping network, else in z from the nearest of `STARTS` random ones. The
    generator's parameters must not require gradients; with classes its labels are bound (`gans.models.conditioning`).
    `report` gets each step's number (from 0), loss and image. Source of the schedules: StyleGAN2, arXiv 1912.04958,
    appendix D.
    """
    mapped = getattr(generator.config, "has_mapping", False)
    if config.every_block and not mapped:
        raise ValueError(f"every_block needs a mapping network, which {type(generator.config).__name__} does not have")
    distance = feature_distance(features) if features is not None and config.features else None

    def image_of(code: Tensor) -> Tensor:
        with rng.per_image([config.seed] * len(code)):  # one noise for all steps
            return generator.synthesize(code) if mapped else generator(code)

    def loss_of(images: Tensor) -> Tensor:
        loss = config.pixels * (images - target).square().mean()
        return loss if distance is None else loss + config.features * distance(images, target)

    draws = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        starts = torch.randn(STARTS, generator.config.latent_dim, generator=draws).to(target)
        if mapped:
            # One at a time, since bound labels are those of one image.
            codes = torch.cat([generator.map_latents(z[None]) for z in starts])
            code, spread = codes.mean(0, keepdim=True), codes.std()
        else:
            errors = torch.stack([(image_of(z[None]) - target).square().mean() for z in starts])
            code, spread = starts[errors.argmin()][None], torch.zeros(())
        if config.every_block:
            code = code[:, None].repeat(1, generator.config.blocks, 1)
    code = nn.Parameter(code.clone())
    optimizer = torch.optim.Adam([code], lr=config.lr, betas=(0.9, 0.999))
    losses = []
    for step in range(config.steps):
        progress = step / config.steps
        ramp = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - progress) / 0.25))
        optimizer.param_groups[0]["lr"] = config.lr * ramp * min(1.0, (progress + 1 / config.steps) / 0.05)
        noise = torch.randn(code.shape, generator=draws).to(code)
        noisy = code + noise * (spread * config.noise * max(0.0, 1 - progress / 0.75) ** 2).to(code)
        images = image_of(noisy)
        loss = loss_of(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        report(step, losses[-1], images.detach())
        if not math.isfinite(losses[-1]):
            break
    with torch.no_grad():
        image = image_of(code).detach()
    if not math.isfinite(losses[-1]) or not image.isfinite().all():
        raise ValueError(
            f"step {len(losses)} led to numbers that are not finite (loss {losses[-1]}): lr is {config.lr}, pixels "
            f"{config.pixels} and features {config.features}; lower them"
        )
    return Projection("w" if mapped else "z", code.detach(), image, losses)
