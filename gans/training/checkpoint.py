"""Checkpoints: written whole or not at all, checked when they are read, pruned, and exact to resume from.

A checkpoint is a folder `step-00001000` with the weights in safetensors (`generator`, `generator_ema`,
`discriminator`), `config.json`, `state.pt` with the optimisers, the random generators' states, the step and the
position in the data, and `SHA256SUMS` with a checksum of each (`sha256sum -c` reads it). It is written under another
name, flushed to disk and then renamed, so a run killed at any moment leaves complete checkpoints only. Folders with
other names, such as a copy `step-00001000-best`, are nobody's business here.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gans.common.files import save_tensors, sha256

PREFIX = "step-"
PARTIAL = ".partial-"
STATE = "state.pt"
CONFIG = "config.json"
CHECKSUMS = "SHA256SUMS"

_NAME = re.compile(rf"{PREFIX}([0-9]{{8}}|[1-9][0-9]{{8,}})")
"""Exactly the names that `path_of` gives."""
BEST = "best"
"""The folder beside them with the checkpoint of the smallest distance."""
REPLACED = f"{PARTIAL}replaced-"
"""Begins the name of a checkpoint while another takes its place."""
_LEFTOVER = re.compile(rf"{re.escape(PARTIAL)}([0-9]+|(old|replaced)-({_NAME.pattern}|{BEST}))")
"""Exactly the names of what a killed process may leave."""


class DamagedError(ValueError):
    """A file of a checkpoint is missing, cannot be read or does not have its checksum."""


def rng_state() -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """States of torch's global generators: the CPU's and those of every GPU."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": gpus}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restores what `rng_state` returned; GPU states only where there are as many GPUs."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def path_of(root: Path, step: int) -> Path:
    """The folder in `root` of the checkpoint of a step."""
    return root / f"{PREFIX}{step:08d}"


def save(
    root: Path,
    step: int,
    *,
    models: Mapping[str, nn.Module],
    state: Mapping[str, Any],
    config: Any,
    keep: int,
    best: bool = False,
) -> Path:
    """Writes `root/step-<step>` and deletes all but the `keep` newest; with `best`, replaces `root/best` instead.
    Returns its path.

    Raises OSError, naming the folder and the last good checkpoint, when it cannot be written (a full disk, say);
    nothing of the attempt is left.

    Args:
        models: name of each weights file, and its model.
        state: tensors and plain values for `state.pt`.
        config: JSON values for `config.json`.
    """
    partial = root / f"{PARTIAL}{step}"
    final = root / BEST if best else path_of(root, step)
    try:
        with writing(final, root):
            root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(root)
            partial.mkdir()
            for name, model in models.items():
                tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
                save_tensors(tensors, partial / f"{name}.safetensors")
            torch.save(dict(state), partial / STATE)
            (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            write_checksums(partial)
            for path in (*partial.iterdir(), partial):
                _flush(path)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # A folder cannot take the place of another at once: where this is killed in between, `remove_leftovers` puts the
    # one before back. It may be a link, of a folder that the user moved elsewhere and that may be gone.
    replaced = root / f"{REPLACED}{final.name}"
    with writing(final, root):
        if os.path.lexists(final):
            os.replace(final, replaced)
        os.replace(partial, final)
        _flush(root)
    if os.path.lexists(replaced):
        _discard(replaced)
    for old in [] if best else list_checkpoints(root)[:-keep]:
        _discard(old)
    return final


@contextmanager
def writing(path: Path, root: Path) -> Iterator[None]:
    """Inside, `path` is written for the run with checkpoints in `root`. OSError says what went wrong and the way on."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # the libraries report a full disk in their own ways
        there = next(folder for folder in path.absolute().parents if folder.is_dir())
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise OSError(
            number,
            f"cannot write {path}: {error} ({shutil.disk_usage(there).free / 2**20:.0f} MiB free). If the disk "
            f"is full, make room. {way_on(root)}",
        ) from error


def way_on(root: Path) -> str:
    """How a run that has stopped goes on, for the end of a message."""
    last = find("latest", root)
    return f"Last good checkpoint: {last or 'none'}; --resume latest {'goes on from it' if last else 'starts afresh'}"


def write_checksums(path: Path) -> None:
    """Writes `SHA256SUMS` for the files of a folder, which `load_weights` and the others then check."""
    files = sorted(file for file in path.iterdir() if file.name != CHECKSUMS)
    (path / CHECKSUMS).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files))


def _discard(path: Path) -> None:
    # Renamed first, so that a half-deleted folder never looks like a checkpoint.
    doomed = path.with_name(f"{PARTIAL}old-{path.name.removeprefix(REPLACED)}")
    os.replace(path, doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_symlink():  # moved elsewhere by the user, whose it is
        path.unlink()
    else:
        shutil.rmtree(path)


def remove_leftovers(root: Path) -> None:
    """Removes what a process that was killed has left in `root`, half written or half deleted; what was whole, and to
    be replaced, gets its name again.
    """
    for leftover in _named(root, _LEFTOVER):
        final = root / leftover.name.removeprefix(REPLACED)
        if leftover.name.startswith(REPLACED) and not os.path.lexists(final):
            os.replace(leftover, final)
        else:
            _remove(leftover)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named(root: Path, name: re.Pattern[str]) -> list[Path]:
    """Folders and links, which may lead nowhere."""
    return [path for path in root.glob("*") if name.fullmatch(path.name) and (path.is_symlink() or path.is_dir())]


def step_of(path: Path) -> int:
    """The step in the name that `path_of` gave a checkpoint."""
    return int(path.name.removeprefix(PREFIX))


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first: the folders named as `path_of` names them."""
    return sorted((path for path in _named(root, _NAME) if path.is_dir()), key=step_of)


def holds_run(root: Path) -> bool:
    """Whether a folder has any checkpoint, by whatever name a killed process may have left it under."""
    put_aside = any(path.name.startswith(REPLACED) for path in _named(root, _LEFTOVER))
    return put_aside or bool(list_checkpoints(root)) or os.path.lexists(root / BEST)


def find(resume: str, root: Path) -> Path | None:
    """The checkpoint that `resume` names: a checkpoint folder, or "latest" for the newest in `root` (None if
    empty).

    Raises FileNotFoundError for a folder that holds no checkpoint.
    """
    if resume == "latest":
        found = list_checkpoints(root)
        return found[-1] if found else None
    path = Path(resume)
    if not (path / STATE).is_file():
        raise FileNotFoundError(f"resume is {resume!r}, which is not a checkpoint folder (it has no {STATE})")
    return path


def _listed(path: Path) -> dict[str, str]:
    """The checksums in a checkpoint by their files' names; none in folders of earlier versions."""
    sums = path / CHECKSUMS
    lines = sums.read_text(errors="replace").removesuffix("\n").split("\n") if sums.exists() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _check(file: Path) -> None:
    """OSError for a file that is missing or cannot be read, ValueError for one that does not have its checksum."""
    listed = _listed(file.parent)
    if listed and sha256(file) != listed.get(file.name):
        raise ValueError(f"its checksum is not the one in {CHECKSUMS}, so it is damaged")
    file.stat()


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Inside, a file of a checkpoint is read, after it has been checked. DamagedError names it where that fails, and
    the newest checkpoint beside it that is good.
    """
    try:
        _check(file)
        yield
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise DamagedError(f"cannot read {file}: {error}{_way_round(file.parent)}") from error


def _way_round(damaged: Path) -> str:
    if not _NAME.fullmatch(damaged.name):
        return ""
    others = (path for path in reversed(list_checkpoints(damaged.parent)) if path != damaged)
    good = next((path for path in others if _is_good(path)), None)
    if good is None:
        return f". No other checkpoint in {damaged.parent} is good"
    return f". Last good checkpoint: {good}. Move {damaged} away, and 'latest' is that one"


def _is_good(path: Path) -> bool:
    try:
        for name in {STATE, CONFIG, *_listed(path)}:
            _check(path / name)
    except (OSError, ValueError):
        return False
    return True


def load_config(path: Path) -> Any:
    """The JSON values of a checkpoint's configuration; DamagedError if the file cannot be read."""
    with _reading(path / CONFIG):
        return json.loads((path / CONFIG).read_text())


def load_weights(path: Path, name: str, model: nn.Module) -> None:
    """Loads one weights file of a checkpoint into `model`.

    Raises DamagedError if the file cannot be read, and ValueError if its names or shapes are not the model's.
    """
    try:
        model.load_state_dict(load_tensors(path, name))
    except RuntimeError as error:
        raise ValueError(f"cannot load {path / name}.safetensors: {error}") from error


def load_tensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one weights file of a checkpoint; DamagedError if it cannot be read."""
    file = path / f"{name}.safetensors"
    with _reading(file):
        return load_file(file)


def load_state(path: Path) -> dict[str, Any]:
    """A checkpoint's `state.pt`, on the CPU; DamagedError if the file cannot be read."""
    file = path / STATE
    with _reading(file):
        return torch.load(file, map_location="cpu", weights_only=True)
