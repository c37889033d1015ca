"""Checkpoints: written whole or not at all, pruned, and exact to resume from.

A checkpoint is a folder `step-00001000` with the weights in safetensors (`generator`, `generator_ema`,
`discriminator`), `config.json`, and `state.pt` with the optimisers, the random generators' states, the step and the
position in the data. It is written under another name, flushed to disk and then renamed, so a run killed at
any moment leaves complete checkpoints only.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gans.tools.files import save_tensors

PREFIX = "step-"
PARTIAL = ".partial-"
STATE = "state.pt"
CONFIG = "config.json"


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
) -> Path:
    """Writes `root/step-<step>` and deletes all but the `keep` newest. Returns its path.

    Raises OSError, naming the folder and the last good checkpoint, when it cannot be written (a full disk, say);
    nothing of the attempt is left.

    Args:
        models: name of each weights file, and its model.
        state: tensors and plain values for `state.pt`.
        config: JSON values for `config.json`.
    """
    partial = root / f"{PARTIAL}{step}"
    final = path_of(root, step)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{PARTIAL}*"):
            shutil.rmtree(leftover)
        partial.mkdir()
        for name, model in models.items():
            tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
            save_tensors(tensors, partial / f"{name}.safetensors")
        torch.save(dict(state), partial / STATE)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for path in (*partial.iterdir(), partial):
            _flush(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # the libraries report a full disk in their own ways
        shutil.rmtree(partial, ignore_errors=True)
        good = find("latest", root)
        free = shutil.disk_usage(root).free / 2**20 if root.is_dir() else 0
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise OSError(
            number,
            f"cannot write checkpoint {final}: {error} ({free:.0f} MiB free). Last good checkpoint: {good or 'none'}",
        ) from error
    if final.exists():
        _discard(final)
    os.replace(partial, final)
    _flush(root)
    for old in list_checkpoints(root)[:-keep]:
        _discard(old)
    return final


def _discard(path: Path) -> None:
    # Renamed first, so that a half-deleted folder never looks like a checkpoint.
    doomed = path.with_name(f"{PARTIAL}old-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in root.glob(f"{PREFIX}*") if path.is_dir())


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


def load_config(path: Path) -> Any:
    """The JSON values of a checkpoint's configuration; ValueError if the file cannot be read."""
    try:
        return json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path / CONFIG}: {error}") from error


def load_weights(path: Path, name: str, model: nn.Module) -> None:
    """Loads one weights file of a checkpoint into `model`.

    Raises ValueError if the file cannot be read, or if its names or shapes are not the model's.
    """
    file = path / f"{name}.safetensors"
    try:
        model.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"cannot load {file}: {error}") from error


def load_state(path: Path) -> dict[str, Any]:
    """A checkpoint's `state.pt`, on the CPU; ValueError if the file cannot be read."""
    file = path / STATE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
