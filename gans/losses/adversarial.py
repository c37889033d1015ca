"""GAN losses: one configuration, and the class that turns it into the terms that the trainer minimises.

An adversarial loss is a pair of functions of scores; `gans.losses.penalties` has what is added for the discriminator.
Each term is a scalar tensor with a name, so the trainer can log it and can name the one that stops being finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from gans.losses.penalties import (
    Network,
    PenaltyMode,
    check_pairs,
    consistency,
    drift,
    gradient_penalty,
    zero_centered_penalty,
)

Terms = dict[str, Tensor]
AdversarialName = Literal["wasserstein", "nonsaturating", "relativistic", "hinge"]


@dataclass(frozen=True)
class LossConfig:
    """Which loss and penalties; the defaults are TransGAN's (`wgangp-eps`). A weight of 0 removes its term."""

    adversarial: AdversarialName = "wasserstein"
    """"wasserstein", "nonsaturating", "relativistic" (pairs each real image with a generated one) or "hinge"."""
    gp_weight: float = 10.0
    """Weight of WGAN-GP's gradient penalty between real and generated images."""
    gp_target: float = 1.0
    """The gradient norm that the gradient penalty leaves alone (phi)."""
    drift: float = 1e-3
    """Weight of the squared mean score of real images, TransGAN's epsilon term; 0 gives the paper's plain WGAN-GP."""
    r1: float = 0.0
    """gamma of R1: gamma / 2 times the mean squared gradient norm at real images (`zero_centered_penalty`)."""
    r2: float = 0.0
    """gamma of R2: the same at generated images."""
    penalty_mode: PenaltyMode = "exact"
    """How R1 and R2 are computed: "exact" (double backward), or an estimate along one random direction an image by
    "finite-difference" or "jvp" (forward mode). All have the same expectation, so the weights mean the same."""
    penalty_sigma: float = 0.01
    """Step of "finite-difference", for images in [-1, 1]: its own error is of order sigma^2,
    that of rounding 1 / sigma."""
    penalty_every: int = 1
    """Lazy regularisation: gradient penalties only every this many D steps, weighted by as much."""
    out_of_range: float = 0.0
    """Weight of the generator's mean squared excess over [-1, 1], for generators with a linear output against a
    discriminator that does not see it (ours)."""
    bcr_real: float = 0.0
    """Weight of balanced consistency on real images (ViTGAN's paper 10, its authors' later code 1)."""
    bcr_fake: float = 0.0
    """Weight of balanced consistency on generated images."""
    bcr_against: Literal["clean", "augmented"] = "clean"
    """What the score of augmented images is compared to: "clean" images (bCR's paper) or a second augmentation."""

    def __post_init__(self) -> None:
        if self.adversarial not in ADVERSARIAL:
            raise ValueError(f"loss.adversarial is {self.adversarial!r}; it must be one of {', '.join(ADVERSARIAL)}")
        if self.bcr_against not in ("clean", "augmented"):
            raise ValueError(f"loss.bcr_against is {self.bcr_against!r}; it must be 'clean' or 'augmented'")
        for name in ("gp_weight", "drift", "r1", "r2", "out_of_range", "bcr_real", "bcr_fake"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; it cannot be negative")
        if self.penalty_mode not in get_args(PenaltyMode):
            raise ValueError(
                f"loss.penalty_mode is {self.penalty_mode!r}; it must be one of {', '.join(get_args(PenaltyMode))}"
            )
        if self.penalty_mode != "exact" and self.gp_weight:
            raise ValueError(
                f"loss.penalty_mode is {self.penalty_mode!r}, which estimates squared gradient norms (loss.r1, "
                "loss.r2); WGAN-GP's penalty is of the norm itself and has no such estimate: make loss.gp_weight "
                f"(now {self.gp_weight}) 0, or loss.penalty_mode 'exact'"
            )
        for name in ("gp_target", "penalty_sigma"):
            if getattr(self, name) <= 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; it must be positive")
        if self.penalty_every < 1:
            raise ValueError(f"loss.penalty_every is {self.penalty_every}; it must be at least 1")

    def check_fits(self, generator: Any, discriminator: Any) -> None:
        """ValueError with the reason where this loss cannot go with these configurations of networks."""
        against_clean = (self.bcr_real or self.bcr_fake) and self.bcr_against == "clean"
        if against_clean and getattr(discriminator, "scores_clean", False):
            raise ValueError(
                f"loss.bcr_against is 'clean', and {type(discriminator).__name__} scores clean images already: "
                "balanced consistency would be 0; make it 'augmented'"
            )
        if self.gp_weight and has_levels(generator, discriminator):
            raise ValueError(
                f"loss.gp_weight is {self.gp_weight}, and WGAN-GP's penalty mixes real images with generated ones, "
                f"which {type(generator).__name__} makes in levels: make it 0, and use loss.r1 and loss.r2"
            )


def has_levels(generator: Any, discriminator: Any) -> bool:
    """Whether, by their configurations, the discriminator sees the levels that the generator makes an image in."""
    return all(getattr(config, "levels", 1) > 1 for config in (generator, discriminator))


def wasserstein_d(real: Tensor, fake: Tensor) -> Tensor:
    """E D(fake) - E D(real). Source: "Wasserstein GAN", Arjovsky et al. 2017, arXiv 1701.07875, equation 2."""
    return fake.mean() - real.mean()


def wasserstein_g(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """-E D(fake), also the hinge loss's generator term."""
    return -fake.mean()


def nonsaturating_d(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(-D(real)) + E softplus(D(fake)). Source: Goodfellow et al. 2014, arXiv 1406.2661, equation 1."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def nonsaturating_g(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """E softplus(-D(fake)). Source: Goodfellow et al. 2014, arXiv 1406.2661, section 3."""
    return F.softplus(-fake).mean()


def relativistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(D(fake) - D(real)) over pairs.

    Source: "The relativistic discriminator", Jolicoeur-Martineau 2018, arXiv 1807.00734 (RSGAN); with
    R1 and R2 it is the loss of "The GAN is dead; long live the GAN!", Huang et al. 2025, arXiv 2501.05441.
    """
    return F.softplus(fake - real).mean()


def relativistic_g(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """E softplus(D(real) - D(fake)) over pairs; sources as `relativistic_d`."""
    if real is None:
        raise ValueError("the relativistic generator loss needs the scores of real images, got real=None")
    return F.softplus(real - fake).mean()


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - D(real)) + E max(0, 1 + D(fake)). Source: "Geometric GAN", Lim & Ye 2017, arXiv 1705.02894."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def out_of_range(images: Tensor) -> Tensor:
    """E max(0, |x| - 1)^2 over all values of images, which should be in [-1, 1]."""
    return F.relu(images.abs() - 1).square().mean()


ADVERSARIAL: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor | None], Tensor]]] = {
    "wasserstein": (wasserstein_d, wasserstein_g),
    "nonsaturating": (nonsaturating_d, nonsaturating_g),
    "relativistic": (relativistic_d, relativistic_g),
    "hinge": (hinge_d, wasserstein_g),
}
"""The discriminator's and the generator's function of each loss."""


class Loss:
    """What the trainer asks of a loss; a loss overrides what it has. Every term is a mean over the images given."""

    uses_real: bool = False
    """Whether `generator` must be given real images."""
    discriminator_penalty_every: int = 1
    """Lazy regularisation: `discriminator_penalty` has terms only every this many updates, weighted by as much. Logs
    have them without that factor: the mean over updates, as if they were in each."""
    generator_penalty_every: int = 1
    """The same of `generator_penalty`."""

    def discriminator(self, discriminator: Network, real: Tensor, fake: Tensor) -> Terms:
        """The discriminator's terms without a gradient in them; `fake` carries no graph."""
        raise NotImplementedError

    def discriminator_penalty(self, discriminator: Network, real: Tensor, fake: Tensor, *, step: int) -> Terms:
        """The discriminator's terms with a gradient of it in them, at its update `step` (from 0)."""
        return {}

    def generator(self, discriminator: Network, real: Tensor | None, fake: Tensor) -> Terms:
        """The generator's terms; `fake` carries its graph."""
        raise NotImplementedError

    def generator_penalty(self, generator: Network, z: Tensor, *, step: int) -> Terms:
        """The generator's terms with a gradient of it in them, at its update `step` (from 0)."""
        return {}


class GANLoss(Loss):
    """The terms of a `LossConfig`; their sum is what each network minimises."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.uses_real = config.adversarial == "relativistic"
        self.discriminator_penalty_every = config.penalty_every
        self._adversarial_d, self._adversarial_g = ADVERSARIAL[config.adversarial]

    def discriminator(self, discriminator: Network, real: Tensor, fake: Tensor) -> Terms:
        """Terms `adversarial` and, where their weight is not 0, `drift` and `bcr`."""
        config = self.config
        check_pairs(real, fake, levels=True)
        real_logits, fake_logits = discriminator(real), discriminator(fake)
        terms = {"adversarial": self._adversarial_d(real_logits, fake_logits)}
        if config.drift:
            terms["drift"] = config.drift * drift(real_logits)
        clean = config.bcr_against == "clean"
        bcr = []
        if config.bcr_real:
            bcr.append(config.bcr_real * consistency(discriminator, real, real_logits, clean=clean))
        if config.bcr_fake:
            bcr.append(config.bcr_fake * consistency(discriminator, fake, fake_logits, clean=clean))
        if bcr:
            terms["bcr"] = torch.stack(bcr).sum()
        return terms

    def discriminator_penalty(self, discriminator: Network, real: Tensor, fake: Tensor, *, step: int) -> Terms:
        """Terms `penalty` (WGAN-GP), `r1` and `r2`, where their weight is not 0 and `penalty_every` has them due."""
        config = self.config
        # Lazy regularisation keeps the mean weight: StyleGAN2, arXiv 1912.04958, section 3.1.
        every = self.discriminator_penalty_every
        terms: Terms = {}
        if step % every:
            return terms
        if config.gp_weight:
            weight = every * config.gp_weight
            terms["penalty"] = weight * gradient_penalty(discriminator, real, fake, config.gp_target)
        for name, gamma, images in (("r1", config.r1, real), ("r2", config.r2, fake)):
            if gamma:
                penalty = zero_centered_penalty(discriminator, images, config.penalty_mode, config.penalty_sigma)
                terms[name] = every * gamma / 2 * penalty
        return terms

    def generator(self, discriminator: Network, real: Tensor | None, fake: Tensor) -> Terms:
        """Term `adversarial`, for which `real` is used where `uses_real` says so, and where its weight is not 0
        `out_of_range`.
        """
        terms: Terms = {}
        if self.config.out_of_range:
            terms["out_of_range"] = self.config.out_of_range * out_of_range(fake)
        if not self.uses_real:
            return {"adversarial": self._adversarial_g(discriminator(fake), None)} | terms
        if real is None:
            raise ValueError("the relativistic generator loss needs real images, got real=None")
        check_pairs(real, fake, levels=True)
        return {"adversarial": self._adversarial_g(discriminator(fake), discriminator(real))} | terms
