"""Distances between generated and real images, to follow a run by.

`RandomFeatureFrechet` needs no other network; `NetworkFrechet` measures over one of `gans.features.vectors`, such as a
judge. For the result of a run use `python -m gans evaluate`, which takes more images and has more measures.

`RandomFeatureFrechet` is a Fréchet distance between Gaussian fits, like FID, but over the features of a small
convolutional network with fixed random weights. It is not FID, nor comparable with it: use it to follow one
run, or to compare runs on the same images, size and count.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gans.evaluation import measures
from gans.features.vectors import FeatureNetwork, load_network

WIDTHS = (16, 32, 32)


class Metric(Protocol):
    """A distance of images to a fixed set of real ones."""

    name: str
    floor: float
    """The distance between two halves of the real images."""
    count: int
    """How many real images there are."""

    def __call__(self, images: Tensor) -> float:
        """Distance of generated images `(N, C, H, W)` in [-1, 1] to the real ones."""
        ...


def random_features(images: Tensor, batch: int = 256) -> Tensor:
    """Features `(N, 128)` in float64 of images `(N, C, H, W)` in [-1, 1].

    Three 3x3 convolutions of stride 2 with 16, 32 and 32 channels and leaky ReLU, weights drawn from a fixed
    seed with unit gain, and the means of the last layer over the four quarters of its map.
    """
    generator = torch.Generator().manual_seed(20240229)
    weights = []
    channels = images.shape[1]
    for width in WIDTHS:
        weight = torch.randn(width, channels, 3, 3, generator=generator) * math.sqrt(2 / (9 * channels))
        weights.append(weight.to(images.device))
        channels = width
    features = []
    for x in images.split(batch):
        for weight in weights:
            x = F.leaky_relu(F.conv2d(x, weight, stride=2, padding=1), 0.2)
        features.append(F.adaptive_avg_pool2d(x, 2).flatten(1))
    return torch.cat(features).double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features `(N, D)`, with C the covariances."""
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(mean + cov_a.trace() + cov_b.trace() - 2 * cross)


class RandomFeatureFrechet:
    """Distance of images to a fixed set of real ones.

    Attributes: `floor`, the distance between two halves of the real images (what a perfect generator would
    get from as many images as a half has), and `count`, how many real images there are.
    """

    name = "random-feature Fréchet distance"

    def __init__(self, real: Tensor) -> None:
        if len(real) < 4:
            raise ValueError(f"real has {len(real)} images; a distance needs at least 4")
        self.count = len(real)
        features = random_features(real)
        # Features of unit total variance: a distance of 1 is as far as real images lie from their own mean.
        self._scale = 1 / features.var(dim=0).sum().sqrt().clamp(min=1e-12)
        self._features = features * self._scale
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).to(real.device)
        first, second = self._features[order].tensor_split(2)
        self.floor = frechet_distance(first, second)

    def __call__(self, images: Tensor) -> float:
        """Distance of generated images `(N, C, H, W)` to the real ones."""
        return frechet_distance(self._features, random_features(images) * self._scale)


class NetworkFrechet:
    """Frechet distance over a network, of images to a fixed set of real ones. Attributes as `Metric`."""

    def __init__(self, real: Tensor, network: FeatureNetwork, batch: int = 64) -> None:
        if len(real) < 4:
            raise ValueError(f"real has {len(real)} images; a distance needs at least 4")
        self.name = f"frechet_{network.name}"
        self.count = len(real)
        self._network = network
        self._batch = batch
        self._features = self._extract(real)
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        self.floor = measures.frechet(*self._features[order].tensor_split(2))

    @torch.no_grad()
    def _extract(self, images: Tensor) -> Tensor:
        return torch.cat([self._network(part).cpu() for part in images.split(self._batch)])

    def __call__(self, images: Tensor) -> float:
        """Distance of generated images `(N, C, H, W)` to the real ones."""
        return measures.frechet(self._features, self._extract(images))


def make_metric(choice: str, real: Tensor) -> Metric:
    """The distance to `real` that `choice` names: "random", "lite1", or "judge:FILE" with a file of train-judge.

    Raises ValueError for another choice.
    """
    kind, _, file = choice.partition(":")
    if choice == "random":
        return RandomFeatureFrechet(real)
    if choice == "lite1" or (kind == "judge" and file):
        network = load_network(kind, judge=Path(file) if file else None)  # type: ignore[arg-type]
        return NetworkFrechet(real, network.to(real.device))
    raise ValueError(f"metric is {choice!r}; it must be random, lite1 or judge:FILE")
