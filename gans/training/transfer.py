"""Starting from the weights of another run: what fits by name and shape is taken, and all is accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gans.training import checkpoint

SHOWN = 6
"""Names in a line of the account; the others are counted."""


def find_source(path: str) -> Path:
    """The folder with the weights that `init` names: a checkpoint, or a run's newest. FileNotFoundError if none."""
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        folder = checkpoint.find("latest", folder / "checkpoints") or folder
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"init is {path!r}, which holds no weights; give a run, a checkpoint or an export")
    return folder


def _fit(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> str:
    """Copies what fits into `model`; returns the account."""
    own = model.state_dict(keep_vars=True)
    taken, others = [], []
    with torch.no_grad():
        for name, value in own.items():
            given = tensors.get(name)
            if given is None:
                others.append(name)
            elif given.shape != value.shape:
                others.append(f"{name} ({tuple(given.shape)} there, {tuple(value.shape)} here)")
            else:
                value.copy_(given)
                taken.append(name)
    left = [name for name in tensors if name not in own]
    lines = [f"{where}: {len(taken)} of {len(own)} tensors"]
    lines += [f"not loaded: {_names(others)}"] if others else []
    lines += [f"of no use: {_names(left)}"] if left else []
    return "; ".join(lines)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def transfer(path: str, models: Mapping[str, nn.Module]) -> list[str]:
    """Copies into each model of a run, by the name of its weights file, what fits of the weights at `path`; returns a
    line for each.

    A generator without a file of its own takes the averaged one's, and the other way round. Raises FileNotFoundError
    where there are no weights, and ValueError if nothing of the generator fits.
    """
    source = find_source(path)
    names = {
        "generator": ("generator", "generator_ema", "model"),
        "generator_ema": ("generator_ema", "model", "generator"),
    }
    account = []
    for name, model in models.items():
        files = [file for file in names.get(name, (name,)) if (source / f"{file}.safetensors").exists()]
        if files:
            tensors = checkpoint.load_tensors(source, files[0])
            account.append(f"{name} from {_fit(model, tensors, f'{source}/{files[0]}')}")
        else:
            account.append(f"{name}: no weights in {source}, starts afresh")
    if ": 0 of" in account[0]:
        raise ValueError(f"init is {path!r}, of which nothing fits: {account[0]}")
    return account
