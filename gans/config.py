"""Configuration of a training run, and its JSON form.

`TrainConfig` is the recipe: with the data it determines the weights. `RunConfig` is where and how the recipe
runs; changing it never changes what is learned (other than by rounding, for another device, backend or thread
count).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gans.data import DataConfig
from gans.ema import EMAConfig
from gans.losses import WGANGPConfig
from gans.transgan import DiscriminatorConfig, GeneratorConfig

T = TypeVar("T")


@dataclass(frozen=True)
class TrainConfig:
    """The recipe; the defaults are TransGAN's for CIFAR-10. One step is n_critic discriminator steps and one of G."""

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: WGANGPConfig = field(default_factory=WGANGPConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    images: DataConfig = field(default_factory=DataConfig)
    steps: int = 500_000
    """Generator steps."""
    seed: int = 0
    """Decides initial weights, data order and all noise."""
    n_critic: int = 4
    """Discriminator steps before each generator step."""
    batch_d: int = 64
    """Real images, and as many generated ones, in a discriminator step."""
    batch_g: int = 128
    """Generated images in a generator step."""
    accumulate: int = 1
    """Parts into which every batch is split, one after the other, to save memory; both batch sizes must divide."""
    lr_d: float = 1e-4
    """Adam's learning rate for the discriminator."""
    lr_g: float = 1e-4
    """Adam's learning rate for the generator."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Adam's betas."""
    clip: float = 5.0
    """Largest gradient norm of either network, 0 for none."""

    def __post_init__(self) -> None:
        for name in ("image_size", "channels"):
            ours, theirs = getattr(self.generator, name), getattr(self.discriminator, name)
            if ours != theirs:
                raise ValueError(f"generator.{name} is {ours} and discriminator.{name} is {theirs}; they must agree")
        for name in ("n_critic", "batch_d", "batch_g", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("batch_d", "batch_g"):
            if getattr(self, name) % self.accumulate:
                raise ValueError(f"{name} is {getattr(self, name)}; accumulate ({self.accumulate}) must divide it")
        if self.steps < 0 or self.clip < 0:
            raise ValueError(f"steps ({self.steps}) and clip ({self.clip}) cannot be negative")


@dataclass(frozen=True)
class RunConfig:
    """Where and how a recipe runs."""

    data: str
    """Folder or ZIP file of images, at any depth, or "digits" for scikit-learn's scanned digits."""
    out: str
    """Folder of the run: config.json, log.jsonl, TensorBoard events, samples/, checkpoints/."""
    resume: str | None = None
    """A checkpoint folder, or "latest" for the newest of the run (starts afresh if it has none)."""
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device."""
    backend: str | None = None
    """Attention backend of natten_ext ("auto", "reference", "cpu"...); None leaves its choice."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    log_every: int = 50
    """Steps between lines of the logs, which hold the means since the last."""
    sample_every: int = 1000
    """Steps between sample grids of the averaged generator, always from the same z."""
    sample_count: int = 64
    """Images of a grid."""
    metric_every: int = 0
    """Steps between measurements of the distance to real images (gans.metrics); 0 for never."""
    metric_images: int = 2000
    """Generated images per measurement, and the most real ones that are used."""
    checkpoint_every: int = 5000
    """Steps between checkpoints; the last step always gets one."""
    keep: int = 3
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        for name in ("log_every", "sample_every", "sample_count", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("threads", "metric_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values for JSON (tuples become lists)."""
    return {
        key: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for key, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    }


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """The configuration of class `kind` from `to_dict`'s form; missing keys take their default, unknown ones
    raise.
    """
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - names):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    return kind(**{name: _convert(hints[name], value) for name, value in values.items()})


def _convert(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)  # type: ignore[arg-type]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return value
    return tuple(value) if typing.get_origin(hint) is tuple else value


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names whose values differ between two `to_dict` forms, as "name (old -> new)"."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({a} -> {b})")
    return found
