"""Generators as the commands use them: load one, draw its latents from seeds, make images of them.

A command asks of a generator only `config.latent_dim`, `config.image_size`, `config.channels` and `forward(z)`. A
model may offer more, and commands that need it refuse a generator without it:

- `config.classes`, and then `forward(z, labels)`.
- `map_latents(z, *, truncation=1.0) -> w` and `synthesize(w) -> images`, the two halves of `forward`, for a model
  with a mapping network (as `gans.models.styles.StyleGenerator`). Truncation and interpolation in w need them.
- `denormalize(images) -> images` in [-1, 1], for a model whose output is normalised in another way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import natten_ext
from gans.common import rng
from gans.common.backends import asked_for, must_run
from gans.common.distributed import choose_device
from gans.models.conditioning import bind
from gans.recipes.config import from_dict
from gans.recipes.registry import build, config_class
from gans.training import checkpoint

Weights = Literal["generator_ema", "generator"]
Space = Literal["z", "w"]

EXPORTED = "model"
"""The averaged generator's name in an export, as the Hugging Face hub has it."""


@dataclass(frozen=True, kw_only=True)
class RenderArguments:
    """What every command that makes images of a checkpoint asks for."""

    checkpoint: Path
    """A run's folder (its newest checkpoint), a checkpoint, or a folder that convert has written."""
    truncation: float = 1.0
    """How far w may lie from its mean, from 0 to 1, for generators with a mapping network; 1 changes nothing."""
    scale: int = 1
    """Whole factor by which pixels are enlarged."""
    weights: Weights = "generator_ema"
    """The averaged generator, or the one under training."""
    batch: int = 16
    """Images made at a time."""
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device."""
    backend: str | None = None
    """Attention backend of natten_ext; None leaves its choice."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """The class of all images, by name or number, for generators with classes; without it, seed i shows class i, over
    and over."""

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"scale is {self.scale}; it must be at least 1")

    def load_generator(self) -> nn.Module:
        """The checkpoint's generator; ValueError if it has no class called `class_`, or `backend` cannot run it."""
        generator = load_generator(self.checkpoint, choose_device(self.device), self.weights)
        check_backend(generator, self.backend)
        if self.class_ is not None:
            class_of(generator, self.class_)
        return generator


def attention_backend(name: str | None) -> AbstractContextManager[Any]:
    """Inside, natten_ext runs its backend called `name`; None leaves its choice."""
    return natten_ext.use_backend(name) if name is not None else nullcontext()


def check_backend(generator: nn.Module, name: str | None) -> None:
    """ValueError with the reason where the attention backend that `name` or the environment asks for cannot run it.

    Commands ask before they write anything. The generator runs on fake tensors, which have shapes and no contents.
    """
    name = asked_for(name)
    if name is None:
        return
    device = next(generator.parameters()).device
    with must_run(name, "generator", device), FakeTensorMode(allow_non_fake_inputs=True):
        z = torch.zeros(1, generator.config.latent_dim, device=device)
        bind(generator, labels_of(generator, [0]))(z)


def parse_numbers(name: str, text: str) -> list[int]:
    """The seeds, or blocks, that "0-63,100" names: ranges include both ends, the order is kept.

    Raises ValueError for anything else; `name` is the option that the text came from.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise ValueError(f"{name} has {part!r}; write numbers and ranges, such as 0-63,100")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{name} has {part!r}; a range goes upwards")
        if last >= 2**63:
            raise ValueError(f"{name} has {part!r}; a number must be less than 2^63")
        if last - first >= 10_000_000:
            raise ValueError(f"{name} has {part!r}; a range has at most ten million numbers")
        numbers.extend(range(first, last + 1))
    return numbers


def latents(seeds: Sequence[int], dim: int) -> Tensor:
    """z ~ N(0, I), `(len(seeds), dim)`, on the CPU: row i depends on `seeds[i]` only."""
    return torch.stack([torch.randn(dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def find_weights(path: Path, weights: Weights) -> tuple[Path, str]:
    """The folder that holds `config.json` and the weights, `path` or the newest checkpoint of the run in `path`, and
    the name of the weights' file there, which in an export is another one.

    Raises FileNotFoundError.
    """
    if (path / "checkpoints").is_dir():
        path = checkpoint.find("latest", path / "checkpoints") or path
    name = EXPORTED if weights == "generator_ema" and (path / f"{EXPORTED}.safetensors").is_file() else weights
    missing = [file for file in (checkpoint.CONFIG, f"{name}.safetensors") if not (path / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"checkpoint {str(path)!r} has no {' and no '.join(missing)}; give a run's folder, one of its checkpoints, "
            "or a folder that convert or export has written"
        )
    return path, name


def load_generator(path: Path, device: torch.device, weights: Weights = "generator_ema") -> nn.Module:
    """The generator of a run, a checkpoint or a converted checkpoint, in evaluation mode without gradients."""
    path, name = find_weights(path, weights)
    values = checkpoint.load_config(path)["recipe"]["generator"]
    generator: nn.Module = build(from_dict(config_class("generator", values.get("kind")), values))
    checkpoint.load_weights(path, name, generator)
    generator.class_names = checkpoint.load_config(path).get("classes", [])  # type: ignore[assignment]
    return generator.eval().requires_grad_(False).to(device)


def class_of(generator: nn.Module, name: str) -> int:
    """The number of the class with this name or number; ValueError if the generator has no such class, or none."""
    classes, names = getattr(generator.config, "classes", 0), list(getattr(generator, "class_names", []))
    if not classes:
        raise ValueError(f"class is {name!r}, but the generator has no classes; leave it out")
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < classes:
        return int(name)
    known = f", or one of {', '.join(names[:20])}{' ...' * (len(names) > 20)}" if names else ""
    raise ValueError(f"class is {name!r}; it must be a number from 0 to {classes - 1}{known}")


def labels_of(generator: nn.Module, seeds: Sequence[int], name: str | None = None) -> Tensor | None:
    """The label of each seed's image: that of the class called `name`, else the seed modulo the number of classes; None
    for a generator without classes.
    """
    device, classes = next(generator.parameters()).device, getattr(generator.config, "classes", 0)
    if name is not None:
        return torch.full((len(seeds),), class_of(generator, name), device=device)
    return torch.tensor([seed % classes for seed in seeds], device=device) if classes else None


def has_mapping(generator: nn.Module) -> bool:
    """Whether it offers w between z and images."""
    return hasattr(generator, "map_latents") and hasattr(generator, "synthesize")


def to_codes(
    generator: nn.Module, z: Tensor, labels: Tensor | None = None, *, space: Space = "z", truncation: float = 1.0
) -> Tensor:
    """What the images are made of: z itself, or w for a generator with a mapping network. `labels` `(B,)` with classes.

    Raises ValueError where w or truncation is asked of a generator without one.
    """
    if not 0 <= truncation <= 1:
        raise ValueError(f"truncation is {truncation}; it must be in [0, 1], where 1 leaves the samples as they are")
    if space == "z" and truncation == 1:
        return z
    if not has_mapping(generator):
        wish = "space w" if space == "w" else f"truncation {truncation}"
        raise ValueError(f"{wish} needs a mapping network, which {type(generator.config).__qualname__} does not have")
    with torch.no_grad():
        return bind(generator, labels).map_latents(z, truncation=truncation)


@torch.no_grad()
def render(
    generator: nn.Module,
    seeds: Sequence[int],
    *,
    batch: int = 16,
    truncation: float = 1.0,
    codes: Tensor | None = None,
    space: Space = "z",
    name: str | None = None,
) -> Iterator[Tensor]:
    """Images `(n, C, H, W)` in [-1, 1] (clamped) on the CPU, batch by batch, n <= `batch`.

    Image i has the z and the noise of `seeds[i]`, whatever else is in its batch; with `codes`, rows of z or w by
    `space`, only the noise is that of the seeds. Its class is the one called `name`, or goes by the seed (`labels_of`).
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    device = next(generator.parameters()).device
    labels = labels_of(generator, seeds, name)
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        own = None if labels is None else labels[start : start + batch]
        with rng.per_image(part):
            if codes is None:
                z = latents(part, generator.config.latent_dim).to(device)
                x = to_codes(generator, z, own, truncation=truncation)
                mapped = truncation != 1
            else:
                x = codes[start : start + batch].to(device)
                mapped = space == "w"
            images = generator.synthesize(x) if mapped else bind(generator, own)(x)
        if hasattr(generator, "denormalize"):
            images = generator.denormalize(images)
        yield images.float().clamp(-1, 1).cpu()
