"""Feature maps of the networks of timm."""

from __future__ import annotations

import torch
from torch import Tensor

from gans.features.network import STRIDES, MapNetwork


class TimmMaps(MapNetwork):
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
