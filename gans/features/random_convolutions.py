"""Convolutions with random weights: no knowledge of images, no package and no download."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.features.network import MapNetwork, VectorNetwork


class RandomMaps(MapNetwork):
    """A strided convolution for each map, with leaky ReLU, weights drawn anew each time; for tests and ablations."""

    channels = (8, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, self.channels[0], 3, stride=4, padding=1)
        rest = (nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(self.channels))
        self.convs = nn.ModuleList([stem, *rest])

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, x = [], images
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            maps.append(x)
        return maps


class RandomVectors(VectorNetwork):
    """Three 3x3 convolutions of stride 2 with leaky ReLU, and the means of the last map's four quarters.

    The weights are drawn from a fixed seed with unit gain, for as many channels as the images have. Distances over it
    follow one run, or compare runs on the same images, size and count.
    """

    name = "random"
    about = "convolutions with random weights"
    num_features = 128
    SEED = 20240229
    WIDTHS = (16, 32, 32)
    fingerprint = f"{SEED}-{WIDTHS}"

    def forward(self, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.SEED)
        x = images
        for width in self.WIDTHS:
            fan_in = 9 * x.shape[1]
            weight = torch.randn(width, x.shape[1], 3, 3, generator=generator) * math.sqrt(2 / fan_in)
            x = F.leaky_relu(F.conv2d(x, weight.to(x.device), stride=2, padding=1), 0.2)
        return F.adaptive_avg_pool2d(x, 2).flatten(1)
