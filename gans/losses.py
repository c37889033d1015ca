"""GAN losses. One class a loss, made from its frozen config; `gans.registry` finds the class of a config.

A loss has two methods, each returning its terms by name; the sum of the terms is what is minimised, and every
term is a scalar tensor, so the trainer can log it and can name the one that stops being finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]
Terms = dict[str, Tensor]


class Loss(Protocol):
    """What the trainer needs of a loss."""

    def discriminator(self, discriminator: Network, real: Tensor, fake: Tensor) -> Terms: ...

    def generator(self, discriminator: Network, fake: Tensor) -> Terms: ...


@dataclass(frozen=True)
class WGANGPConfig:
    """Wasserstein loss with gradient penalty and drift term; the defaults are TransGAN's (`wgangp-eps`)."""

    gp_weight: float = 10.0
    """Weight of the gradient penalty."""
    gp_target: float = 1.0
    """The gradient norm that costs nothing (phi)."""
    drift: float = 1e-3
    """Weight of the squared mean score of real images, which keeps scores near 0; 0 gives plain WGAN-GP (paper)."""

    def __post_init__(self) -> None:
        if self.gp_target <= 0:
            raise ValueError(f"loss.gp_target is {self.gp_target}; it must be positive")


def gradient_penalty(discriminator: Network, real: Tensor, fake: Tensor, target: float = 1.0) -> Tensor:
    """E[(|grad D(x)|_2 - target)^2] / target^2 at x uniformly between paired real and fake images.

    Source: "Improved Training of Wasserstein GANs", Gulrajani et al. 2017, arXiv 1704.00028, section 4; the
    division by target^2 is TransGAN's. `real` and `fake` are `(B, C, H, W)` with one mixing weight per pair
    from the global generator. The result can be differentiated with respect to the discriminator's parameters
    (second order).
    """
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have one shape, got {tuple(real.shape)} and {tuple(fake.shape)}")
    mix = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    between = (mix * real + (1 - mix) * fake).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return (norm - target).square().mean() / target**2


class WGANGP:
    """L_D = E D(fake) - E D(real) + gp_weight * penalty + drift * (E D(real))^2;  L_G = -E D(fake).

    The drift term squares the mean over the images of one call, so with gradient accumulation it squares the
    mean of each part of the batch (as the published code does); all other terms are plain means.
    """

    def __init__(self, config: WGANGPConfig) -> None:
        self.config = config

    def discriminator(self, discriminator: Network, real: Tensor, fake: Tensor) -> Terms:
        """Terms `wasserstein`, `penalty` and, unless its weight is 0, `drift`; `fake` carries no graph."""
        config = self.config
        real_score = discriminator(real).mean()
        terms = {"wasserstein": discriminator(fake).mean() - real_score}
        if config.gp_weight:
            terms["penalty"] = config.gp_weight * gradient_penalty(discriminator, real, fake, config.gp_target)
        if config.drift:
            terms["drift"] = config.drift * real_score.square()
        return terms

    def generator(self, discriminator: Network, fake: Tensor) -> Terms:
        """Term `adversarial`."""
        return {"adversarial": -discriminator(fake).mean()}
