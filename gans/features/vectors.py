"""Networks over whose features generated images are measured.

A `FeatureNetwork` takes images `(B, C, H, W)` in [-1, 1] of any size, grey or colour, and gives one vector each. A
distance is named after its network: `frechet_judge` and `frechet_inception` have nothing to do with one another.
"""

from __future__ import annotations

import importlib.util
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.common.files import sha256
from gans.features import lite1
from gans.features.judge import load_judge

NetworkName = Literal["judge", "lite1", "inception"]


class FeatureNetwork(nn.Module):
    """A frozen network with a name.

    Attributes: `name`; `num_features`; `about`, one line for people; `fingerprint`, which changes with whatever
    changes the features.
    """

    name: str
    num_features: int
    about: str
    fingerprint: str

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to features `(B, num_features)` in float32."""
        raise NotImplementedError


def resize(images: Tensor, size: int) -> Tensor:
    """Square images of side `size`, by antialiased bicubic interpolation, clamped to [-1, 1]."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images as colour ones, or colour ones as grey (ITU-R 601 luma, as Pillow has it)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


class JudgeNetwork(FeatureNetwork):
    """A classifier of `train-judge`: the layer before the scores."""

    name = "judge"

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.judge, about = load_judge(weights)
        self.num_features = self.judge.config.features
        self.fingerprint = sha256(weights)
        self.about = (
            f"{about['task']} of {about['data']}, {self.judge.config.size} px, "
            f"{100 * about['accuracy']:.1f} % right of {about['held_out']} held out"
        )

    def forward(self, images: Tensor) -> Tensor:
        config = self.judge.config
        return self.judge.features(with_channels(resize(images, config.size), config.channels))


class Lite1Network(FeatureNetwork):
    """EfficientNet-Lite1 trained on ImageNet: the mean of its last map, at 240 pixels."""

    name = "lite1"
    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        self.network = lite1.load_lite1()
        self.fingerprint = sha256(lite1.lite1_weights())
        self.about = f"EfficientNet-Lite1, ImageNet, {lite1.IMAGE_SIZE} px"

    def forward(self, images: Tensor) -> Tensor:
        images = resize(with_channels(images, 3), lite1.IMAGE_SIZE)
        return self.network.extract_features(images).mean(dim=(2, 3))


class InceptionNetwork(FeatureNetwork):
    """Inception v3 as FID has it (2048 features; it resizes to 299 pixels itself).

    `weights` is either NVIDIA's TorchScript file (`inception-2015-12-05.pt`), which needs no other package, or
    torch-fidelity's state dict (`weights-inception-2015-12-05-6726825d.pth`); None lets torch-fidelity download the
    latter. torch-fidelity needs torchvision.
    """

    name = "inception"
    num_features = 2048

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        if weights is not None and not weights.is_file():
            raise FileNotFoundError(f"inception weights {str(weights)!r} are not a file")
        self.script = weights is not None and _is_torchscript(weights)
        self.network = _load_script(weights) if self.script else _load_torch_fidelity(weights)
        self.fingerprint = sha256(weights) if weights else "torch-fidelity's own"
        self.about = f"Inception v3, ImageNet, 299 px, weights {weights.name if weights else self.fingerprint}"

    def forward(self, images: Tensor) -> Tensor:
        images = with_channels(images, 3).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return (self.network(images, return_features=True) if self.script else self.network(images)[0]).float()


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _load_script(path: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is going out of fashion; the file stays
        return torch.jit.load(path, map_location="cpu").eval()


def _load_torch_fidelity(weights: Path | None) -> nn.Module:
    missing = [name for name in ("torch_fidelity", "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"network inception needs {' and '.join(missing)} (pip install torch-fidelity, and the torchvision that "
            "fits your torch) or, without them, a TorchScript file: --inception-weights inception-2015-12-05.pt"
        )
    if weights is not None:
        try:
            torch.load(weights, map_location="cpu", weights_only=True)  # the library would run code in the file
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"inception weights {str(weights)!r} cannot be read as tensors: {error}") from error
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        path = None if weights is None else str(weights)
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    except OSError as error:  # urllib's errors are among them
        raise ValueError(
            f"inception's weights cannot be downloaded ({error}); give a file with --inception-weights"
        ) from error
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"inception weights {str(weights)!r} are not torch-fidelity's: {error}") from error


def load_network(
    name: NetworkName, *, judge: Path | None = None, inception_weights: Path | None = None
) -> FeatureNetwork:
    """The network called `name`, in evaluation mode; `judge` is the file that the judge is in."""
    if name == "judge":
        if judge is None:
            raise ValueError("network judge needs its file: --judge FILE, made with python -m gans train-judge")
        return JudgeNetwork(judge)
    if name == "lite1":
        return Lite1Network()
    if name == "inception":
        return InceptionNetwork(inception_weights)
    raise ValueError(f"network is {name!r}; it must be judge, lite1 or inception")
