"""Where images come from: folders, ZIP files, CIFAR-10's archive, scikit-learn's digits; with labels where there are.

Labels of a folder or a ZIP file are, in this order, what `metadata.csv` or `metadata.jsonl` (columns `file_name` and
`label`, the convention of Hugging Face `datasets`) or `dataset.json` (`{"labels": [[file, label], ...]}`, the
convention of StyleGAN) say, or else the names of the folders that the images are in. Top folders named `train`,
`test`, `validation` or `val` are splits.

Left out is what operating systems and programs put beside images: whatever lies under a name that begins with a dot
(`._x.png`, `.ipynb_checkpoints`) or is in `LITTER`. Links to files and folders are followed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
DIGITS = "digits"
SPLITS = ("train", "test", "validation", "val")
METADATA = ("metadata.csv", "metadata.jsonl", "dataset.json")
LITTER = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})

MAX_PIXELS = 2**26
"""The largest image that is decoded, 8192x8192; what follows takes up to 16 bytes a pixel, 1 GiB."""
MAX_BYTES = 8 * MAX_PIXELS
"""The largest file that is read: as large as that image can be without compression, at 16 bits a channel."""


class BrokenImageError(ValueError):
    """A file that is no readable image; the message has its name."""


def decode(read: Callable[[], bytes], called: str) -> Image.Image:
    """The image in the bytes that `read` returns, turned upright as its EXIF data say; BrokenImageError, which names it
    as `called`, if there is none.
    """
    try:
        image = Image.open(io.BytesIO(read()))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are decoded")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:  # Pillow's decoders raise all sorts
        what = "Pillow knows no such format" if isinstance(error, UnidentifiedImageError) else error
        raise BrokenImageError(f"cannot read image {called}: {what}") from error


class ImageSource(Protocol):
    """A numbered collection of images."""

    names: list[str]
    """A name for each image; of a file, its path within the source with slashes."""
    labels: list[int] | None
    """The class number of each image, or None if there are no labels."""
    classes: list[str]
    """Names of the classes; empty without labels."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Image number `index`; raises BrokenImageError."""
        ...


class FileImages:
    """Image files of a folder or an archive, however deep, in the order of their names.

    Labels are read when they are asked for: training does without, so it needs no complete ones.
    """

    def __init__(self, origin: Path, names: Sequence[str], split: str) -> None:
        self.origin = origin
        files = sorted({name for name in names if not any(map(_is_litter, PurePosixPath(name).parts))})
        images = [name for name in files if _is_image(name)]
        tables = [name for name in files if PurePosixPath(name).name in METADATA]
        splits = sorted({_top(name) for name in images} & set(SPLITS))
        if split in splits:
            images = [name for name in images if _top(name) == split]
            tables = [name for name in tables if _top(name) == split or _top(name) not in splits]
        elif split != "train":
            raise ValueError(f"split {split!r} is not in {str(origin)!r}, which has {', '.join(splits) or 'no splits'}")
        self.names = images
        self._tables = tables

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> list[int] | None:
        return self._labelled[0]

    @property
    def classes(self) -> list[str]:
        return self._labelled[1]

    def size_of(self, name: str) -> int:
        """The size of a file in bytes, without compression."""
        raise NotImplementedError

    def read(self, name: str, size: int) -> bytes:
        """At most `size` bytes of a file."""
        raise NotImplementedError

    def open(self, index: int) -> Image.Image:
        name = self.names[index]
        return decode(lambda: self._contents(name), f"{name!r} in {str(self.origin)!r}")

    def _contents(self, name: str) -> bytes:
        size = self.size_of(name)
        if size > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes without compression; at most {MAX_BYTES:,} are read")
        return self.read(name, size)

    @cached_property
    def _labelled(self) -> tuple[list[int] | None, list[str]]:
        found: dict[str, Any] = {}
        for name in self._tables:
            found |= self._metadata(name)
        if found:
            if missing := [name for name in self.names if name not in found]:
                tables = ", ".join(self._tables)
                raise ValueError(
                    f"{len(missing)} images of {str(self.origin)!r} have no label in {tables}, such as {missing[0]!r}"
                )
        else:
            found = {name: PurePosixPath(name).parent.name for name in self.names}
        values = {found[name] for name in self.names}
        if len(values) < 2:
            return None, []
        order = sorted(values, key=lambda value: (isinstance(value, str), value))
        numbers = {value: i for i, value in enumerate(order)}
        return [numbers[found[name]] for name in self.names], [str(value) for value in order]

    def _metadata(self, name: str) -> dict[str, Any]:
        """File names, relative to the source, and labels in one metadata file."""
        path, folder = PurePosixPath(name), PurePosixPath(name).parent
        try:
            text = self._contents(name).decode()
            if path.name == "dataset.json":
                rows = json.loads(text).get("labels") or []
                pairs = [(file, label) for file, label in rows]
            elif path.suffix == ".csv":
                pairs = [
                    (row["file_name"], row["label"]) for row in csv.DictReader(io.StringIO(text)) if "label" in row
                ]
            else:
                lines = [json.loads(line) for line in text.splitlines() if line.strip()]
                pairs = [(row["file_name"], row["label"]) for row in lines if "label" in row]
            found = {(folder / file).as_posix(): label for file, label in pairs}
        except Exception as error:  # contents and archives raise all sorts
            raise ValueError(f"cannot read labels in {name!r} of {str(self.origin)!r}: {error!r}") from error
        for file, label in found.items():
            if not isinstance(label, (int, str)):
                raise ValueError(f"label of {file!r} in {name!r} is {label!r}; it must be a number or a name")
        return found


def _top(name: str) -> str:
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else ""


def _is_litter(part: str) -> bool:
    return part.startswith(".") or part in LITTER


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


class FolderImages(FileImages):
    """Every image file under a folder, and under the folders that it has links to."""

    def __init__(self, root: Path, split: str = "train") -> None:
        super().__init__(root, list(_files(root)), split)

    def size_of(self, name: str) -> int:
        return (self.origin / name).stat().st_size

    def read(self, name: str, size: int) -> bytes:
        with (self.origin / name).open("rb") as file:
            return file.read(size)


def _files(root: Path) -> Iterator[str]:
    """The names of all files under a folder, litter left out.

    Raises ValueError that names a link to nowhere, unless it is called as an image (a broken one), and a folder that
    is reached by two ways, whose images would count twice or without end.
    """
    names: dict[str, str] = {}

    def walk(folder: str) -> Iterator[str]:
        real = os.path.realpath(root / folder)
        if real in names:
            raise ValueError(
                f"data {str(root)!r} has the folder {real!r} twice, as {names[real] or '.'!r} and {folder!r}; "
                "remove the link that one of them is or lies under"
            )
        names[real] = folder
        with os.scandir(root / folder) as entries:
            found = sorted((entry for entry in entries if not _is_litter(entry.name)), key=lambda entry: entry.name)
        for entry in found:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                yield from walk(name)
            elif entry.is_file() or (entry.is_symlink() and _is_image(name)):
                yield name
            elif entry.is_symlink():
                raise ValueError(f"data {str(root)!r} has a link {name!r} that leads nowhere ({os.readlink(entry)!r})")

    yield from walk("")


class ZipImages(FileImages):
    """Every image file in a ZIP archive."""

    def __init__(self, path: Path, split: str = "train") -> None:
        self._archive: zipfile.ZipFile | None = None
        self._owner = -1
        try:
            archive = zipfile.ZipFile(path)
        except Exception as error:  # a damaged archive raises all sorts
            raise ValueError(f"data {str(path)!r} is not a readable ZIP file: {error}") from error
        with archive:
            entries = [info for info in archive.infolist() if not info.is_dir()]
        if links := [info.filename for info in entries if stat.S_ISLNK(info.external_attr >> 16)]:
            raise ValueError(
                f"data {str(path)!r} has {len(links)} links, such as {links[0]!r}, in the place of what they lead to; "
                "pack it without links (zip without --symlinks)"
            )
        super().__init__(path, [info.filename for info in entries], split)

    def size_of(self, name: str) -> int:
        return self._opened().getinfo(name).file_size

    def read(self, name: str, size: int) -> bytes:
        # Asked for a number of bytes, zipfile unpacks no more, whatever the archive says of its size.
        with self._opened().open(name) as file:
            return file.read(size)

    def _opened(self) -> zipfile.ZipFile:
        # One handle a process: forked workers would otherwise share a file offset.
        if self._archive is None or self._owner != os.getpid():
            self._archive = zipfile.ZipFile(self.origin)
            self._owner = os.getpid()
        return self._archive

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None}


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


def class_labels(source: ImageSource, classes: int, data: str) -> list[int] | None:
    """The label of every image for networks of so many classes, None for 0; ValueError where `source` (at `data`) has
    no labels, or others.
    """
    if not classes:
        return None
    if not source.labels:
        raise ValueError(
            f"data {data!r} has no labels, and the networks have {classes} classes: put each class in a folder of its "
            "own, add dataset.json or metadata.csv, or make generator.classes and discriminator.classes 0"
        )
    if len(source.classes) != classes:
        raise ValueError(
            f"data {data!r} has {len(source.classes)} classes, and generator.classes is {classes}; they must agree"
        )
    return source.labels


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
    ours = re.compile(r"data_batch_\d+|test_batch|batches\.meta")
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir() if ours.fullmatch(file.name)}
    files = {}
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if not member.isfile() or not ours.fullmatch(name):
                continue
            if member.size > MAX_BYTES:
                raise ValueError(f"{name} has {member.size:,} bytes without compression")
            files[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return files


def _unpickle(content: bytes) -> Any:
    return _ArraysOnly(io.BytesIO(content), encoding="bytes").load()


def open_source(data: str | Path, split: str = "train") -> ImageSource:
    """The images at `data`: a folder, a ZIP file, CIFAR-10's archive, or the name "digits".

    `split` chooses among the splits of a source that has them; "train" is also the name of all images of one that
    has none. Raises FileNotFoundError for a path that does not exist and ValueError for one without images or
    without the split.
    """
    if str(data) == DIGITS:
        if split != "train":
            raise ValueError(f"split is {split!r}; {DIGITS!r} has no splits")
        return digits()
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f"data {str(path)!r} does not exist; give a folder, a ZIP file or {DIGITS!r}")
    if (path / "data_batch_1").is_file() or (path.is_file() and ".tar" in path.suffixes) or path.suffix == ".tgz":
        return cifar10(path, split)
    source = FolderImages(path, split) if path.is_dir() else ZipImages(path, split)
    if len(source) == 0:
        raise ValueError(
            f"data {str(path)!r} has no images; looked for files ending in {', '.join(sorted(EXTENSIONS))}"
        )
    return source
