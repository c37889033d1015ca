"""Penalties on a discriminator, each a function of the discriminator and images `(B, C, H, W)`.

A discriminator gives an image one logit, `(B,)`, or several, `(B, logits)`; D(x) is then their mean, as in the
adversarial losses.

Every result is a scalar that can be differentiated with respect to the discriminator's parameters. The gradient
penalties are themselves made of a derivative, so that derivative is of second order; attention in the
discriminator must have a double backward or a forward mode that can be differentiated (`natten_ext` has both).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from gans.common import rng
from gans.common.distributed import batch_mean
from gans.common.forward_mode import directional_derivative

Network = Callable[..., Tensor]
PenaltyMode = Literal["exact", "finite-difference", "jvp"]


def _scores(discriminator: Network, images: Tensor) -> Tensor:
    """D(x), `(B,)`."""
    return discriminator(images).reshape(len(images), -1).mean(1)


def _input_gradient(discriminator: Network, images: Tensor) -> Tensor:
    """d D(x) / d x at each image, flattened to `(B, C * H * W)`; it carries a graph to the parameters."""
    images = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(_scores(discriminator, images).sum(), images, create_graph=True)
    return gradient.flatten(1)


def check_pairs(real: Tensor, fake: Tensor, *, levels: bool = False) -> None:
    """ValueError unless real and generated images come in pairs; with `levels`, a generated image may come with all of
    its levels, as further channels.
    """
    channels = real.shape[1] * (fake.shape[1] // real.shape[1] if levels else 1)
    if fake.shape != (len(real), channels, *real.shape[2:]):
        raise ValueError(f"real and fake must have one shape, got {tuple(real.shape)} and {tuple(fake.shape)}")


def gradient_penalty(discriminator: Network, real: Tensor, fake: Tensor, target: float = 1.0) -> Tensor:
    """E[(|grad D(x)|_2 - target)^2] / target^2 at x uniformly between paired real and fake images.

    Source: "Improved Training of Wasserstein GANs", Gulrajani et al. 2017, arXiv 1704.00028, section 4; the
    division by target^2 is TransGAN's. One mixing weight per pair comes from `gans.common.rng`. ValueError unless
    `real` and `fake` have one shape.
    """
    check_pairs(real, fake)
    mix = rng.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    norm = torch.linalg.vector_norm(_input_gradient(discriminator, mix * real + (1 - mix) * fake), dim=1)
    return (norm - target).square().mean() / target**2


def zero_centered_penalty(
    discriminator: Network, images: Tensor, mode: PenaltyMode = "exact", sigma: float = 0.01
) -> Tensor:
    """The R1 penalty of real images, the R2 penalty of generated ones: E[|grad D(x)|_2^2].

    Source: "Which Training Methods for GANs do actually Converge?", Mescheder et al. 2018, arXiv 1801.04406,
    equations 9 (R1) and 10 (R2), there with the factor gamma / 2, which is `LossConfig.r1` and `r2`.

    Every mode has this expectation, for "finite-difference" up to O(sigma^2), over one normal direction v an image from
    `gans.common.rng`: E[(grad D(x) . v)^2] = |grad D(x)|^2.

    - "exact": the gradient itself, by double backward.
    - "jvp": (grad D(x) . v)^2 by forward mode.
    - "finite-difference": ((D(x + sigma v) - D(x)) / sigma)^2, both with the same random draws. The approximated R1 of
      "Diffusion Adversarial Post-Training", Lin et al. 2025, arXiv 2501.08316, which does not divide by sigma^2.

    Where images share a batch norm or the like, the gradient is that of the sum of their scores, in every mode. A
    discriminator of that kind has a method `scored_together(batch)`: how many consecutive images of a batch depend on
    one another.
    """
    images = images.detach()
    if mode == "exact":
        return _input_gradient(discriminator, images).square().sum(1).mean()
    direction = rng.randn(*images.shape, device=images.device, dtype=images.dtype)
    if mode == "jvp":
        slopes = directional_derivative(lambda x: _scores(discriminator, x), images, direction)
    elif mode == "finite-difference":
        with rng.rewound(images.device):
            scores = _scores(discriminator, images)
        slopes = (_scores(discriminator, images + sigma * direction) - scores) / sigma
    else:
        raise ValueError(f"mode must be 'exact', 'finite-difference' or 'jvp', got {mode!r}")
    together = getattr(discriminator, "scored_together", lambda batch: 1)(len(images))
    return slopes.unflatten(0, (-1, together)).sum(1).square().mean() / together


def consistency(discriminator: Network, images: Tensor, logits: Tensor, *, clean: bool = True) -> Tensor:
    """E[(D(T(x)) - D(x))^2] for the discriminator's own DiffAug T, given `logits` = D(T(x)).

    Source: "Improved Consistency Regularization for GANs", Zhao et al. 2020, arXiv 2002.04724: on real and on
    generated images it is balanced consistency regularisation (bCR). With `clean=False` the second view is
    augmented too, by fresh draws. The discriminator must take `augment=False`.
    """
    return (logits - discriminator(images, augment=not clean)).square().mean()


def drift(real_logits: Tensor) -> Tensor:
    """(E D(real))^2, which keeps the scores near 0; the mean is over all processes' images.

    Of several logits `(B, logits)` each is kept near 0: the result is the mean of their squares.

    Source: TransGAN's published loss (`wgangp-eps`), which squares the mean; ProGAN (arXiv 1710.10196, appendix
    A.1) takes the mean of squares.
    """
    return batch_mean(real_logits).square().mean()
