"""Networks that are told which class an image is of: labels `(B,)` of whole numbers from 0 on.

A generator gets the class as a second latent; a discriminator's features are compared with a vector of the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ClassesConfig:
    """What every network's configuration has for classes."""

    classes: int = 0
    """Classes of the data's labels, which the networks are told; 0 for none (`--conditional` takes the data's)."""

    def _check_classes(self, owner: str) -> None:
        """ValueError for a number of classes that means nothing."""
        if self.classes < 0 or self.classes == 1:
            raise ValueError(f"{owner}.classes is {self.classes}; it must be 0, for none, or at least 2")


def normalized(x: Tensor) -> Tensor:
    """`x` `(B, dim)` scaled to unit mean square."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def check_labels(classes: int, labels: Tensor | None) -> None:
    """ValueError unless labels are given where there are classes, and only there."""
    if (labels is not None) != bool(classes):
        wish = f"labels, for the network was made for {classes} classes" if classes else "no labels: it has no classes"
        raise ValueError(f"labels is {None if labels is None else tuple(labels.shape)}; it needs {wish}")


class LatentAndClass(nn.Module):
    """z `(B, dim)` with a learned vector of the class beside it, `(B, width)`; without classes z itself.

    The vector is scaled to unit mean square, as StyleGAN2-ADA (arXiv 2006.06676, published code) and GAT have it.
    """

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.classes = classes
        self.width = 2 * dim if classes else dim
        self.embedding = nn.Embedding(classes, dim) if classes else None

    def forward(self, z: Tensor, labels: Tensor | None) -> Tensor:
        check_labels(self.classes, labels)
        return z if self.embedding is None else torch.cat([z, normalized(self.embedding(labels))], dim=1)


class ClassScore(nn.Module):
    """What the class adds to the score of features `(B, dim)`: their product with a learned vector of the class of unit
    mean square, over sqrt(dim), `(B,)`; 0 without classes.

    Source: "cGANs with Projection Discriminator", Miyato & Koyama 2018, arXiv 1802.05637, equation 5; unit vectors, so
    that a class cannot make the slope any steeper, and the factor are StyleGAN2-ADA's.
    """

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.classes = classes
        self.embedding = nn.Embedding(classes, dim) if classes else None

    def forward(self, features: Tensor, labels: Tensor | None) -> Tensor | float:
        check_labels(self.classes, labels)
        if self.embedding is None:
            return 0.0
        return (features * normalized(self.embedding(labels))).sum(1) * features.shape[1] ** -0.5


class Conditioned:
    """A network and the labels of the batch that it is going to be given: called like one without classes."""

    def __init__(self, network: nn.Module, labels: Tensor) -> None:
        self.network, self.labels = network, labels

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        return self.network(x, self.labels, **options)

    def map_latents(self, z: Tensor, **options: Any) -> Tensor:
        """w of z and the labels, of a generator with a mapping network."""
        return self.network.map_latents(z, self.labels, **options)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


def bind(network: nn.Module, labels: Tensor | None) -> Any:
    """`network` with its labels, if it has any."""
    return network if labels is None else Conditioned(network, labels)
