"""Files: digests, tensors, and outputs that appear when they are complete."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

PARTIAL = ".partial-"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that others may read as far as they may read other new files; replaces an older one.

    Safetensors itself gives its files to their owner alone, whatever the umask says.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when all has gone well and vanishes otherwise.

    Makes the folder; replaces an older file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(PARTIAL + path.name)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, as `new_file`; FileExistsError where `path` exists."""
    if path.exists():
        raise FileExistsError(f"out {str(path)!r} exists; give another folder")
    partial = path.with_name(PARTIAL + path.name)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
