"""Image files in folders and ZIP files, with labels where there are.

Labels are, in this order, what `metadata.csv` or `metadata.jsonl` (columns `file_name` and `label`, the convention of
Hugging Face `datasets`) or `dataset.json` (`{"labels": [[file, label], ...]}`, the convention of StyleGAN; for us
also `"classes": [name, ...]`, names of the labels) say, or else the names of the folders that the images are in. Top
folders named `train`, `test`, `validation` or `val` are splits.

Left out is what operating systems and programs put beside images: whatever lies under a name that begins with a dot
(`._x.png`, `.ipynb_checkpoints`) or is in `LITTER`. Links to files and folders are followed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Set
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from gans.common.files import mark_of
from gans.data.decoding import MAX_BYTES, decode
from gans.data.labels import ClassNames, NamedImages, number_classes

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = ("train", "test", "validation", "val")
METADATA = ("metadata.csv", "metadata.jsonl", "dataset.json")
LITTER = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})


class FileImages(NamedImages):
    """Image files of a folder or an archive, however deep, in the order of their names."""

    def __init__(self, origin: Path, names: Iterable[str]) -> None:
        self.origin = origin
        files = sorted({name for name in names if not is_litter(name)})
        self.names = [name for name in files if is_image(name)]
        self._tables = [name for name in files if PurePosixPath(name).name in METADATA]

    def size_of(self, name: str) -> int:
        """The size of a file in bytes, without compression."""
        raise NotImplementedError

    def read(self, name: str, size: int) -> bytes:
        """At most `size` bytes of a file."""
        raise NotImplementedError

    def called(self, name: str) -> str:
        """What messages call a file."""
        return f"{name!r} in {str(self.origin)!r}"

    def folder_of(self, name: str) -> str:
        """The name of the folder that an image is in, which is its label if there are no others."""
        return PurePosixPath(name).parent.name

    def own_labels(self, called: ClassNames) -> dict[str, Any]:
        """Labels beside the images rather than in tables, of each image that has one; adds names of their numbers."""
        return {}

    def marks(self) -> Iterator[bytes]:
        raise NotImplementedError

    def open(self, index: int) -> Image.Image:
        name = self.names[index]
        return decode(lambda: self.contents(name), self.called(name))

    def contents(self, name: str) -> bytes:
        """A file, whole; ValueError if it is too large."""
        size = self.size_of(name)
        if size > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes without compression; at most {MAX_BYTES:,} are read")
        return self.read(name, size)

    def find_labels(self) -> tuple[list[int] | None, list[str]]:
        found: dict[str, Any] = {}
        called = ClassNames()
        for name in self._tables:
            found |= self._metadata(name, called)
        where = f"in {', '.join(self._tables)}"
        if not found:
            found = self.own_labels(called)
            where = "beside them"
        if not found:
            if any(PurePosixPath(name).name == "dataset.json" for name in self._tables):
                return None, []  # StyleGAN's folders are of a thousand images each
            found = {name: self.folder_of(name) for name in self.names}
        if missing := [name for name in self.names if name not in found]:
            raise ValueError(
                f"{len(missing)} of {len(self)} images of {str(self.origin)!r} have no label {where}, such as "
                f"{missing[0]!r}"
            )
        values = [found[name] for name in self.names]
        return number_classes(values, lambda i: self.called(self.names[i]), called.by_number)

    def _metadata(self, name: str, called: ClassNames) -> dict[str, Any]:
        """File names, relative to the source, and labels in one metadata file; adds names of numbers."""
        classes: list[str] = []
        path, folder = PurePosixPath(name), PurePosixPath(name).parent
        try:
            text = self.contents(name).decode()
            if path.name == "dataset.json":
                table = json.loads(text)
                pairs = [(file, label) for file, label in table.get("labels") or []]
                classes = [str(each) for each in table.get("classes") or []] if pairs else []
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
        for number, each in enumerate(classes):
            called.add(number, each, self.called(name))
        return found


def _top(name: str) -> str:
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else ""


def is_litter(name: str) -> bool:
    """Whether it lies in what operating systems and programs leave behind."""
    return any(part.startswith(".") or part in LITTER for part in PurePosixPath(name).parts)


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def leads_out(name: str) -> bool:
    """Whether a member of an archive would be unpacked elsewhere than below the archive's folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def of_split(names: Iterable[str], split: str, data: Path) -> list[str]:
    """The files of one split, where top folders are splits, and tables that lie above the splits.

    All files if there are no splits and `split` is "train"; otherwise ValueError.
    """
    files = [name for name in names if not is_litter(name)]
    splits = {_top(name) for name in files if is_image(name)} & set(SPLITS)
    if split in splits:
        return [name for name in files if _top(name) == split or not (is_image(name) or _top(name) in splits)]
    check_whole(split, splits, data)
    return files


def check_whole(split: str, splits: Set[str], data: Path | str) -> None:
    """ValueError for a split that data with these do not have; "train" is then the name of all."""
    if split != "train":
        there = ", ".join(sorted(splits)) or "no splits"
        raise ValueError(f"split {split!r} is not in {str(data)!r}, which has {there}")


class FolderImages(FileImages):
    """Every image file under a folder, and under the folders that it has links to."""

    def __init__(self, root: Path, names: Iterable[str], split: str = "train") -> None:
        super().__init__(root, of_split(names, split, root))

    def size_of(self, name: str) -> int:
        return (self.origin / name).stat().st_size

    def read(self, name: str, size: int) -> bytes:
        with (self.origin / name).open("rb") as file:
            return file.read(size)

    def marks(self) -> Iterator[bytes]:
        for name in self.names:
            yield mark_of(name, self.origin / name)


def files_in(root: Path) -> Iterator[str]:
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
            found = sorted((entry for entry in entries if not is_litter(entry.name)), key=lambda entry: entry.name)
        for entry in found:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                yield from walk(name)
            elif entry.is_file() or (entry.is_symlink() and is_image(name)):
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
        if outside := [info.filename for info in entries if leads_out(info.filename)]:
            raise ValueError(
                f"data {str(path)!r} has a member that leads out of it, {outside[0]!r}; pack it with other names"
            )
        super().__init__(path, of_split([info.filename for info in entries], split, path))

    def size_of(self, name: str) -> int:
        return self._opened().getinfo(name).file_size

    def read(self, name: str, size: int) -> bytes:
        # Asked for a number of bytes, zipfile unpacks no more, whatever the archive says of its size.
        with self._opened().open(name) as file:
            return file.read(size)

    def marks(self) -> Iterator[bytes]:
        for name in self.names:
            info = self._opened().getinfo(name)
            yield f"{name}\0{info.file_size}\0{info.CRC}\n".encode()

    def _opened(self) -> zipfile.ZipFile:
        # One handle a process: forked workers would otherwise share a file offset.
        if self._archive is None or self._owner != os.getpid():
            self._archive = zipfile.ZipFile(self.origin)
            self._owner = os.getpid()
        return self._archive

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None}
