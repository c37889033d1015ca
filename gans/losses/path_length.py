"""StyleGAN2's path length regularisation, beside any of the losses of `gans.losses.adversarial`."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from gans.common import rng
from gans.common.distributed import batch_mean
from gans.losses.adversarial import AdversarialName, GANLoss, LossConfig, Terms


@dataclass(frozen=True)
class PathLengthLossConfig(LossConfig):
    """A `LossConfig` with path length regularisation of the generator; the defaults are StyleGAN2's."""

    adversarial: AdversarialName = "nonsaturating"
    gp_weight: float = 0.0
    drift: float = 0.0
    path_length: float = 2.0
    """Weight of the path length penalty; the generator must have a mapping network."""
    path_length_every: int = 4
    """Lazy regularisation: the penalty only every this many G steps, weighted by as much."""
    path_length_decay: float = 0.01
    """How far the mean path length moves towards a batch's at each penalty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path_length < 0:
            raise ValueError(f"loss.path_length is {self.path_length}; it cannot be negative")
        if self.path_length_every < 1:
            raise ValueError(f"loss.path_length_every is {self.path_length_every}; it must be at least 1")
        if not 0 < self.path_length_decay <= 1:
            raise ValueError(f"loss.path_length_decay is {self.path_length_decay}; it must be in (0, 1]")

    def check_fits(self, generator: Any, discriminator: Any) -> None:
        super().check_fits(generator, discriminator)
        if self.path_length and not getattr(generator, "has_mapping", False):
            raise ValueError(
                f"loss.path_length needs a generator with a mapping network, which {type(generator).__name__} has not"
            )


def path_lengths(generator: Any, z: Tensor) -> Tensor:
    """The path length of each image, `(B,)`: the norm of `J_w^T y` with y ~ N(0, I) / sqrt(pixels).

    Source: "Analyzing and Improving the Image Quality of StyleGAN", Karras et al. 2020, arXiv 1912.04958, section 3.2
    and its published code: squares are summed over w and averaged over the blocks, each of which has a w of its own.
    The result has a graph to the generator's parameters: the double backward of everything in it, attention included.
    An image that w does not change has length 0 and no gradient.
    """
    w = generator.map_latents(z)
    # One w per block, so that each block's own derivative is there.
    w = w[:, None].expand(-1, generator.config.blocks, -1).contiguous()
    images = generator.synthesize(w)
    noise = rng.randn(*images.shape, device=images.device, dtype=images.dtype) * prod(images.shape[2:]) ** -0.5
    (gradient,) = torch.autograd.grad((images * noise).sum(), w, create_graph=True)
    # Not the root of a mean, whose derivative at 0 is infinite: one image without a slope would make all gradients NaN.
    return torch.linalg.vector_norm(gradient, dim=(1, 2)) * gradient.shape[1] ** -0.5


class PathLengthLoss(GANLoss, nn.Module):
    """The terms of a `GANLoss`, and `path_length`: the mean squared distance of path lengths from their mean.

    The mean over the run is a buffer, which starts at 0 and moves at each penalty (with gradient accumulation, at each
    part of it).
    """

    mean_length: Tensor

    def __init__(self, config: PathLengthLossConfig) -> None:
        nn.Module.__init__(self)
        GANLoss.__init__(self, config)
        self.generator_penalty_every = config.path_length_every
        self.register_buffer("mean_length", torch.zeros(()))

    def generator_penalty(self, generator: Any, z: Tensor, *, step: int) -> Terms:
        """Term `path_length`, where its weight is not 0 and `path_length_every` has it due."""
        config = self.config
        assert isinstance(config, PathLengthLossConfig)
        every = self.generator_penalty_every
        if not config.path_length or step % every:
            return {}
        lengths = path_lengths(generator, z)
        with torch.no_grad():
            self.mean_length.lerp_(batch_mean(lengths.detach()).to(self.mean_length), config.path_length_decay)
        penalty = (lengths - self.mean_length).square().mean()
        return {"path_length": every * config.path_length * penalty}
