"""Frozen networks whose feature maps a projected discriminator looks at.

A `FeatureMaps` takes RGB images in [-1, 1] and gives four maps, from fine to coarse, at strides 4, 8, 16 and 32. To add
one, write a class with `channels` and `forward`, and give it a name with `register`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.features import lite1

STRIDES = (4, 8, 16, 32)
"""Image side over map side of the four maps."""


class FeatureMaps(nn.Module):
    """A frozen feature network. Subclasses set `channels` and define `forward`.

    It stays in evaluation mode whatever `train` says, and its parameters require no gradient once `make_features` has
    made it; gradients go through to the images.
    """

    channels: tuple[int, int, int, int]
    """Channels of the four maps."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `(B, 3, S, S)` in [-1, 1] to maps `(B, channels[i], S / s, S / s)`, s in STRIDES; 32 divides S."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> FeatureMaps:
        return super().train(False)


class Lite1Features(FeatureMaps):
    """EfficientNet-Lite1 (arXiv 1905.11946; the paper of Projected GANs has Lite1, its published code Lite0).

    Trained on ImageNet; 3.4 M parameters up to the last map.
    """

    channels = (24, 40, 112, 320)
    TAPS = (3, 6, 14, 20)
    """Blocks after which the maps are taken."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("cpu"):  # weights come from a file, wherever the rest of a model is made
            network = lite1.load_lite1()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.TAPS:
                maps.append(x)
        return maps


class RandomFeatures(FeatureMaps):
    """Convolutions with random weights: no knowledge of images, no package and no download; for tests and ablations."""

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


class TimmFeatures(FeatureMaps):
    """A network of the package timm with its trained weights, by its name there; it must offer the four strides.

    timm downloads weights at first use. Images are brought to the mean and deviation that the network was trained with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError as error:
            raise ValueError(f"features timm:{name} needs timm: pip install timm") from error
        with torch.device("cpu"):
            network = timm.create_model(name, pretrained=True, features_only=True)
        reductions = list(network.feature_info.reduction())
        if missing := [stride for stride in STRIDES if stride not in reductions]:
            raise ValueError(f"features timm:{name} has no map of stride {missing[0]}; it has {reductions}")
        self.network = network
        self.taps = [reductions.index(stride) for stride in STRIDES]
        channels = network.feature_info.channels()
        self.channels = tuple(channels[tap] for tap in self.taps)  # type: ignore[assignment]
        config = network.pretrained_cfg
        for buffer in ("mean", "std"):
            values = torch.tensor(config[buffer], device="cpu").view(3, 1, 1)
            self.register_buffer(buffer, 2 * values - 1 if buffer == "mean" else 2 * values, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.network((images - self.mean) / self.std)
        return [maps[tap] for tap in self.taps]


FEATURES: dict[str, Callable[[], FeatureMaps]] = {"lite1": Lite1Features, "random": RandomFeatures}
"""By name. `timm:NAME` needs no entry."""


def register(name: str, make: Callable[[], FeatureMaps]) -> None:
    """Makes a feature network known under a name; ValueError if it is taken."""
    if name in FEATURES or name.startswith("timm:"):
        raise ValueError(f"features {name!r} are there already")
    FEATURES[name] = make


def check_features(name: str) -> None:
    """ValueError unless `make_features` knows the name."""
    if name not in FEATURES and not name.startswith("timm:"):
        raise ValueError(f"features is {name!r}; it must be one of {', '.join(FEATURES)} or timm:NAME")


def make_features(name: str) -> FeatureMaps:
    """The feature network called `name`, frozen; "timm:NAME" is network NAME of timm."""
    check_features(name)
    features = TimmFeatures(name.removeprefix("timm:")) if name.startswith("timm:") else FEATURES[name]()
    return features.requires_grad_(False).train()
