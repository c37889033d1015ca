"""A distance between generated and real images that needs no download.

`RandomFeatureFrechet` is a Fréchet distance between Gaussian fits, like FID, but over the features of a small
convolutional network with fixed random weights. It is not FID, nor comparable with it: use it to follow one
run, or to compare runs on the same images, size and count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTHS = (16, 32, 32)


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
