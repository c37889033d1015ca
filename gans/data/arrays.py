"""Images in memory: CIFAR-10's archive, scikit-learn's digits."""

from __future__ import annotations

import io
import itertools
import pickle
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from gans.data.decoding import MAX_BYTES

_CIFAR10 = re.compile(r"data_batch_\d+|test_batch|batches\.meta")


class ArrayImages:
    """Images in memory, uint8 `(N, H, W)` or `(N, H, W, 3)`, with labels."""

    def __init__(self, images: np.ndarray, labels: Sequence[int], classes: Sequence[str]) -> None:
        # A torch tensor, because loader processes share its memory.
        self.images = torch.from_numpy(np.ascontiguousarray(images))
        self.names = [str(i) for i in range(len(images))]
        self.labels: list[int] | None = [int(label) for label in labels]
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index].numpy())

    def marks(self) -> Iterator[bytes]:
        yield repr(tuple(self.images.shape)).encode()
        yield self.images.numpy().tobytes()


def digits() -> ArrayImages:
    """The 1797 scanned 8x8 digits that come with scikit-learn (UCI "Optical Recognition of Handwritten Digits")."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return ArrayImages(images, found.target, [str(i) for i in range(10)])


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain values and nothing else: a pickle could otherwise run any code."""

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def is_cifar10(path: Path) -> bool:
    """Whether a tar file without compression is CIFAR-10's archive, by its first members."""
    try:
        with tarfile.open(path, "r:") as archive:
            return any(_CIFAR10.fullmatch(PurePosixPath(member.name).name) for member in itertools.islice(archive, 3))
    except tarfile.TarError:
        return False


def cifar10(path: Path, split: str = "train") -> ArrayImages:
    """CIFAR-10 from its own archive, `cifar-10-python.tar.gz`, or the folder that it unpacks to.

    `split` is "train" (50,000 images) or "test" (10,000). Source: https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; CIFAR-10 has 'train' and 'test'")
    try:
        files = _cifar10_files(path)
        wanted = r"data_batch_\d+" if split == "train" else "test_batch"
        batches = [_unpickle(files[name]) for name in sorted(files) if re.fullmatch(wanted, name)]
        if not batches:
            raise ValueError(f"it has no {'data_batch_1' if split == 'train' else 'test_batch'}")
        pixels = np.concatenate([batch[b"data"] for batch in batches])
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = [label for batch in batches for label in batch[b"labels"]]
        names = _unpickle(files["batches.meta"])[b"label_names"] if "batches.meta" in files else range(10)
        classes = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
        return ArrayImages(images, labels, classes)
    except (tarfile.TarError, pickle.UnpicklingError, KeyError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"data {str(path)!r} is not CIFAR-10's archive (python version): {error}") from error


def _cifar10_files(path: Path) -> dict[str, bytes]:
    """CIFAR-10's files in its archive, or in a folder, by name."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir() if _CIFAR10.fullmatch(file.name)}
    files = {}
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if not member.isfile() or not _CIFAR10.fullmatch(name):
                continue
            if member.size > MAX_BYTES:
                raise ValueError(f"{name} has {member.size:,} bytes without compression")
            files[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return files


def _unpickle(content: bytes) -> Any:
    return _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
