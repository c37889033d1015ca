"""Where images come from: `open_source` decides which of the formats it is."""

from __future__ import annotations

import glob
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from PIL import Image

from gans.common.unset import names_nothing
from gans.data import arrays, tables
from gans.data.file_images import EXTENSIONS, SPLITS, FolderImages, ZipImages, check_whole, files_in, is_image
from gans.data.shards import ShardImages, common_folder

DIGITS = "digits"
KINDS = f"a folder, a ZIP file, shards (.tar), .parquet files, CIFAR-10's archive, {tables.HUB}NAME or {DIGITS!r}"


class ImageSource(Protocol):
    """A numbered collection of images."""

    names: list[str]
    """A name for each image; of a file, its path within the source with slashes."""

    @property
    def labels(self) -> list[int] | None:
        """The class number of each image, or None if there are no labels. ValueError if some have none."""
        ...

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty without labels."""
        ...

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Image number `index`; raises BrokenImageError."""
        ...

    def marks(self) -> Iterator[bytes]:
        """What a digest is taken of: it changes with the images.

        Of files in a ZIP file it is names, sizes and checksums, of files in a folder and of shards names, sizes and
        times of change (which is quick; a copy counts as changed), of arrays the contents.
        """
        ...


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


def expand(pattern: str) -> list[str]:
    """A name for each choice that is in braces, as a shell has it: `{000..012}`, with zeros, and `{a,b}`."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        return [pattern]
    first, last, names = found.groups()
    if names is None and int(first) > int(last):
        raise ValueError(f"{pattern!r} counts from {first} to {last}; the second must not be less")
    choices = names.split(",") if names else [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in expand(f"{head}{choice}{tail}")]


def check_distinct(files: Sequence[Path], pattern: str) -> None:
    """ValueError if a pattern stands for a file twice."""
    places: set[Path] = set()
    for file in files:
        # The file itself may be a link: the hub's cache has one copy of files of the same contents.
        if (place := file.parent.resolve() / file.name) in places:
            raise ValueError(f"{pattern!r} stands for {str(file)!r} twice; name each file once")
        places.add(place)


def _matching(data: str) -> list[Path]:
    """The files that a pattern with braces, *, ? or [] stands for; FileNotFoundError if one is missing."""
    files: list[Path] = []
    for name in expand(data):
        files += map(Path, sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name])
    missing = [file for file in files if not file.is_file()]
    if missing and len(files) > 1:
        some = f"data {data!r} are {len(files)} files, of which {len(missing)} do not exist"
        raise FileNotFoundError(f"{some}, such as {str(missing[0])!r}")
    if missing or not files:
        raise FileNotFoundError(f"data {data!r} does not exist; give {KINDS}")
    check_distinct(files, data)
    return files


def _of_split(files: Sequence[Path], split: str, data: str) -> list[Path]:
    """The files of one split, where a word of their names is one: `train-0001.tar`, `val/0001.tar`.

    ValueError if a file that `data` names itself, not by `*` or a folder, is of none beside others that are of one.
    """
    root = common_folder(files)
    found = {file: _split_of(file.relative_to(root)) for file in files}
    splits = {name for name in found.values() if name}
    named = set(map(Path, expand(data)))
    if splits and (others := [str(file) for file in files if not found[file] and file in named]):
        raise ValueError(
            f"data {data!r} has files of splits ({', '.join(sorted(splits))}) and {len(others)} of none by "
            f"their names: {', '.join(others[:5])}{' ...' * (len(others) > 5)}; "
            "rename these, or name only those of one kind"
        )
    if split in splits:
        return [file for file in files if found[file] == split]
    check_whole(split, splits, data)
    return list(files)


def _split_of(file: Path) -> str | None:
    words = [word for part in reversed(file.parts) for word in re.findall("[a-z]+", part.lower())]
    return next((word for word in words if word in SPLITS), None)


def _from_files(files: Sequence[Path], split: str, data: str) -> ImageSource:
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".tar"} and not (len(files) == 1 and arrays.is_cifar10(files[0])):
        return ShardImages(_of_split(files, split, data), data)
    if kinds == {".parquet"}:
        return tables.from_parquet(_of_split(files, split, data), data)
    if len(files) > 1:
        raise ValueError(f"data {data!r} are {len(files)} files; several must all be shards (.tar) or .parquet")
    (file,) = files
    if kinds == {".tgz"} or ".tar" in file.suffixes:
        return arrays.cifar10(file, split)
    if kinds != {".zip"} and not zipfile.is_zipfile(file):
        raise ValueError(f"data {data!r} is none of what can be read: {KINDS}")
    return ZipImages(file, split)


def _from_folder(folder: Path, split: str) -> ImageSource:
    if (folder / "data_batch_1").is_file():
        return arrays.cifar10(folder, split)
    if any((folder / name).is_file() for name in tables.SAVED):
        return tables.from_saved(folder, split)
    names = list(files_in(folder))
    packed = sorted(name for name in names if PurePosixPath(name).suffix.lower() in (".tar", ".parquet"))
    if not packed:
        return FolderImages(folder, names, split)
    if any(is_image(name) for name in names):
        pattern = (folder / packed[0]).with_name(f"*{PurePosixPath(packed[0]).suffix}")
        raise ValueError(
            f"data {str(folder)!r} has both image files and {packed[0]!r}: say which are meant, by a folder that has "
            f"only them, or by a pattern such as {str(pattern)!r}"
        )
    return _from_files([folder / name for name in packed], split, str(folder))


def open_source(data: str | Path, split: str = "train") -> ImageSource:
    """The images at `data`:

    - a folder or a ZIP file of images,
    - WebDataset shards, or parquet files as Hugging Face `datasets` has them: one, several by a pattern
      (`shards-{0000..0009}.tar`, `data/*.parquet`), or a folder with nothing but them,
    - a folder that `datasets` saved, or `hf:NAME` for a data set of the hub,
    - CIFAR-10's archive, or the name "digits".

    `split` chooses among the splits of a source that has them; "train" is also the name of all images of one that
    has none. Raises FileNotFoundError for a path that does not exist and ValueError for one without images or
    without the split.
    """
    data = str(data)
    if not data:
        raise ValueError(names_nothing("data"))
    if data == DIGITS:
        if split != "train":
            raise ValueError(f"split is {split!r}; {DIGITS!r} has no splits")
        return arrays.digits()
    if data.startswith(tables.HUB):
        source: ImageSource = tables.from_hub(data, split)
    elif re.match(r"\w+://|pipe:", data):
        raise ValueError(
            f"data is {data!r}; images are read from local files (copy it to one) or from {tables.HUB}NAME"
        )
    elif Path(data).is_dir():
        source = _from_folder(Path(data), split)
    else:
        source = _from_files([Path(data)] if Path(data).exists() else _matching(data), split, data)
    if len(source) == 0:
        raise ValueError(f"data {data!r} has no images; looked for files ending in {', '.join(sorted(EXTENSIONS))}")
    return source
