"""Images of one size, packed for training: into a ZIP file or into shards, with labels."""

from __future__ import annotations

import glob
import io
import itertools
import json
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from gans.common.files import new_file
from gans.data.sources import check_distinct, expand


def check_destination(destination: str) -> list[Path]:
    """The files that are written to, a ZIP file or shards; ValueError for other ones or one twice, FileExistsError
    for old ones.
    """
    files = [Path(name) for name in expand(destination)]
    kinds = {file.suffix.lower() for file in files}
    if kinds != {".tar"} and (kinds, len(files)) != ({".zip"}, 1):
        raise ValueError(
            f"convert is {destination!r}; it must be one ZIP file, NAME.zip, or shards, such as 'NAME-{{000..009}}.tar'"
        )
    if patterned := [file.name for file in files if glob.has_magic(file.name)]:
        raise ValueError(
            f"convert is {destination!r}; a name with *, ? or [, as {patterned[0]!r}, could not be read again"
        )
    check_distinct(files, destination)
    if old := [str(file) for file in files if file.exists()]:
        raise FileExistsError(f"convert is {destination!r}, and {old[0]!r} exists; give another name")
    return files


def pack(
    images: Iterable[np.ndarray],
    count: int,
    labels: Sequence[int] | None,
    classes: Sequence[str],
    files: Sequence[Path],
) -> None:
    """Writes `count` images, uint8 `(C, S, S)`, as PNG in their order to a ZIP file, or in equal parts to shards.

    The ZIP file is as stylegan3's: `00000/img00000000.png`, and the labels in `dataset.json`, with `classes` beside.
    Of shards each sample has the label in `KEY.cls`, and with the name of the class in `KEY.json`. The files appear
    when all are complete.
    """
    numbered = enumerate(images)
    with ExitStack() as stack:
        partial = [stack.enter_context(new_file(file, replace=False)) for file in files]
        if files[0].suffix.lower() == ".zip":
            _write_zip(partial[0], numbered, labels, classes)
            return
        for part, path in enumerate(partial):
            size = count * (part + 1) // len(files) - count * part // len(files)
            _write_shard(path, itertools.islice(numbered, size), labels, classes)


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    pixels = image.transpose(1, 2, 0)
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def _write_zip(
    path: Path, images: Iterable[tuple[int, np.ndarray]], labels: Sequence[int] | None, classes: Sequence[str]
) -> None:
    table = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed
        for number, image in images:
            name = f"{number // 1000:05d}/img{number:08d}.png"
            archive.writestr(zipfile.ZipInfo(name), _png(image))  # which has the same time always
            table.append([name, labels[number] if labels else None])
        about = {"labels": table, "classes": list(classes)} if labels else {"labels": None}
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps(about))


def _write_shard(
    path: Path, images: Iterable[tuple[int, np.ndarray]], labels: Sequence[int] | None, classes: Sequence[str]
) -> None:
    with tarfile.open(path, "w") as archive:
        for number, image in images:
            files = {"png": _png(image)}
            if labels:
                label = labels[number]
                about = {"label": label, "class_name": classes[label]}
                files |= {"cls": str(label).encode(), "json": json.dumps(about).encode()}
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
