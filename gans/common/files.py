"""Files: digests, tensors, and outputs that appear when they are complete."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

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


class Terminated(KeyboardInterrupt):
    """SIGTERM came while files were written, of which nothing is left."""

    status = 128 + signal.SIGTERM
    """The exit status that shells expect."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM raises Terminated, where it would end the process, so that what is open is cleaned up."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated("terminated")

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def mark_of(name: str, path: Path) -> bytes:
    """What changes with a file that is called `name`: that, its size and its time of change."""
    status = path.stat()
    return f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode()


def missing(folder: Path) -> list[Path]:
    """The folders that are made with `folder`, it first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Removes folders of `missing` that were made, but for those in which others have put something since."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _partial(path: Path, prefix: str) -> Iterator[Path]:
    """What is called `path` when it is complete, under another name. If all does not go well, it and the folders that
    were made for it vanish.
    """
    made = missing(path.parent)
    partial = path.with_name(prefix + path.name)
    with _terminable():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
        except BaseException:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
            remove_empty(made)
            raise


def _own() -> str:
    """The beginning of a name that no other process writes to."""
    return f"{PARTIAL}{secrets.token_hex(4)}-"


@contextmanager
def new_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when all has gone well and vanishes otherwise.

    Makes the folder. Replaces an older file; or, with `replace=False`, raises FileExistsError where there is one by
    then, whoever else writes at the same time.
    """
    with _partial(path, PARTIAL if replace else _own()) as partial:
        yield partial
        if not replace:
            try:
                path.touch(exist_ok=False)
            except FileExistsError as error:
                raise FileExistsError(f"{str(path)!r} exists: it was written meanwhile; give another name") from error
        partial.replace(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, as `new_file`; FileExistsError where `path` exists."""
    if path.exists():
        raise FileExistsError(f"out {str(path)!r} exists; give another folder")
    with _partial(path, _own()) as partial:
        partial.mkdir()
        yield partial
        partial.rename(path)
