"""Inception v3 as FID has it, from either of the files in which its weights go round."""

from __future__ import annotations

import importlib.util
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from gans.common.files import sha256
from gans.features.network import VectorNetwork, with_channels


class InceptionVectors(VectorNetwork):
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
