"""Starting from the weights of another run: what fits by name and shape is taken, and all is accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gans.training import checkpoint

SHOWN = 6
"""Names in a line of the account; the others are counted."""
LEAST = 0.05
"""The share of a network's numbers that has to fit: networks of two kinds share a few names and shapes by chance."""


@dataclass(frozen=True)
class Fit:
    """How much of a network came from elsewhere."""

    account: str
    share: float
    """Of its numbers, 0 to 1."""


def find_source(path: str) -> Path:
    """The folder with the weights that `init` names: a checkpoint, or a run's newest. FileNotFoundError if none."""
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        folder = checkpoint.find("latest", folder / "checkpoints") or folder
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"init is {path!r}, which holds no weights; give a run, a checkpoint or an export")
    return folder


def _fit(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> Fit:
    """Copies what fits into `model`."""
    own = model.state_dict(keep_vars=True)
    taken, others, numbers = 0, [], 0
    with torch.no_grad():
        for name, value in own.items():
            given = tensors.get(name)
            if given is None:
                others.append(name)
            elif given.shape != value.shape:
                others.append(f"{name} ({tuple(given.shape)} there, {tuple(value.shape)} here)")
            else:
                value.copy_(given)
                taken, numbers = taken + 1, numbers + value.numel()
    left = [name for name in tensors if name not in own]
    lines = [f"{where}: {taken} of {len(own)} tensors"]
    lines += [f"not loaded: {_names(others)}"] if others else []
    lines += [f"of no use: {_names(left)}"] if left else []
    return Fit("; ".join(lines), numbers / max(1, sum(value.numel() for value in own.values())))


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def transfer(path: str, models: Mapping[str, nn.Module], *, little: bool = False) -> list[str]:
    """Copies into each model of a run, by the name of its weights file, what fits of the weights at `path`; returns a
    line for each.

    A generator without a file of its own takes the averaged one's, and the other way round. Raises FileNotFoundError
    where there are no weights, and ValueError where nothing of the generator fits, or less than `LEAST` of a network
    that has weights there, unless `little` allows that.
    """
    source = find_source(path)
    names = {
        "generator": ("generator", "generator_ema", "model"),
        "generator_ema": ("generator_ema", "model", "generator"),
    }
    account = []
    for name, model in models.items():
        files = [file for file in names.get(name, (name,)) if (source / f"{file}.safetensors").exists()]
        if not files:
            account.append(f"{name}: no weights in {source}, starts afresh")
            continue
        fit = _fit(model, checkpoint.load_tensors(source, files[0]), f"{source}/{files[0]}")
        account.append(f"{name} from {fit.account}")
        if name == "generator" and not fit.share:
            raise ValueError(f"init is {path!r}, of which nothing fits: {account[-1]}")
        if name in ("generator", "discriminator") and fit.share < LEAST and not little:
            raise ValueError(
                f"init is {path!r}, of which {fit.share:.1%} of the {name}'s numbers come, less than {LEAST:.0%}: it "
                f"is another network ({account[-1]}). With --init-little it starts from these all the same"
            )
    return account
