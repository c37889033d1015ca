"""Configuration of a training run, and its JSON form.

`TrainConfig` is the recipe: with the data it determines the weights. `RunConfig` is where and how the recipe runs;
changing it changes what is learned by rounding at most.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from gans.common.unset import names_nothing
from gans.data.loading import DataConfig
from gans.losses.adversarial import LossConfig
from gans.models.adaptive import ADAConfig
from gans.models.ema import EMAConfig
from gans.models.transgan import DiscriminatorConfig, GeneratorConfig
from gans.recipes import registry

T = TypeVar("T")

Precision = Literal["fp32", "bf16", "fp64"]
PenaltyUpdate = Literal["joint", "own"]


@dataclass(frozen=True)
class TrainConfig:
    """The recipe; the defaults are TransGAN's for CIFAR-10. One step is n_critic discriminator steps and one of G."""

    generator: registry.GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: registry.DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: registry.LossConfig = field(default_factory=LossConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    images: DataConfig = field(default_factory=DataConfig)
    ada: ADAConfig = field(default_factory=ADAConfig)
    steps: int = 500_000
    """Generator steps."""
    seed: int = 0
    """Decides initial weights, data order and all noise."""
    n_critic: int = 4
    """Discriminator steps before each generator step."""
    batch_d: int = 64
    """Real images, and as many generated ones, in a discriminator step, over all processes."""
    batch_g: int = 128
    """Generated images in a generator step, over all processes."""
    accumulate: int = 1
    """Parts into which each process splits its batches, one after the other, to save memory."""
    lr_d: float = 1e-4
    """Adam's learning rate for the discriminator."""
    lr_g: float = 1e-4
    """Adam's learning rate for the generator."""
    betas_d: tuple[float, float] = (0.0, 0.99)
    """Adam's betas for the discriminator."""
    betas_g: tuple[float, float] = (0.0, 0.99)
    """Adam's betas for the generator."""
    warmup: int = 0
    """Steps over which both learning rates rise linearly from 0."""
    decay_start: int = 0
    """Step from which both learning rates fall linearly."""
    decay_end: int = 0
    """Step at which they have reached `decay_to` times their value; 0 for no decay."""
    decay_to: float = 0.0
    """Factor of the learning rates at `decay_end`."""
    clip: float = 5.0
    """Largest gradient norm of either network, 0 for none."""
    precision: Precision = "fp32"
    """"bf16" runs matrix products in bfloat16 (autocast; weights stay float32); "fp64" is for checking."""
    penalty_precision: Literal["full", "same"] = "full"
    """Whether penalties on gradients run without autocast, or with the rest's ("same")."""
    penalty_update: PenaltyUpdate = "joint"
    """Whether penalties on gradients are terms of their network's update ("joint"), or get an update of their "own"
    after it, which `clip` leaves alone: StyleGAN2's way with lazy ones, for which it corrects rate and betas."""

    def __post_init__(self) -> None:
        _check_finite(to_dict(self))
        for name in ("image_size", "channels", "levels", "classes"):
            ours, theirs = (getattr(config, name, None) for config in (self.generator, self.discriminator))
            if ours != theirs and None not in (ours, theirs):
                raise ValueError(f"generator.{name} is {ours} and discriminator.{name} is {theirs}; they must agree")
        if check_fits := getattr(self.loss, "check_fits", None):
            check_fits(self.generator, self.discriminator)
        for name in ("n_critic", "batch_d", "batch_g", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("steps", "clip", "lr_d", "lr_g", "warmup", "decay_start", "decay_end", "decay_to"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        for name in ("betas_d", "betas_g"):
            if not all(0 <= beta < 1 for beta in getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; both must be in [0, 1)")
        if abs(self.seed) >= 2**40:  # multiples of it seed torch's generators, which take 64 bits
            raise ValueError(f"seed is {self.seed}; it must be between -2^40 and 2^40")
        if self.precision not in typing.get_args(Precision):
            raise ValueError(
                f"precision is {self.precision!r}; it must be one of {', '.join(typing.get_args(Precision))}"
            )
        if self.penalty_update not in typing.get_args(PenaltyUpdate):
            raise ValueError(
                f"penalty_update is {self.penalty_update!r}; it must be one of "
                f"{', '.join(typing.get_args(PenaltyUpdate))}"
            )
        if (self.precision, self.penalty_precision) == ("bf16", "same") and self._penalty_mode == "finite-difference":
            raise ValueError(
                "penalty_precision is 'same', and bfloat16 cannot resolve loss.penalty_mode 'finite-difference': make "
                "it 'full', or loss.penalty_mode 'exact' or 'jvp'"
            )
        if self.decay_end and self.decay_end <= self.decay_start:
            raise ValueError(f"decay_end is {self.decay_end}; it must come after decay_start ({self.decay_start})")
        self.check_processes(1)

    @property
    def updates(self) -> tuple[tuple[str, ...], ...]:
        """Which terms ("loss", "penalty") each update of a network has, one after the other."""
        return (("loss", "penalty"),) if self.penalty_update == "joint" else (("loss",), ("penalty",))

    @property
    def classes(self) -> int:
        """Classes that the networks are told; 0 for none."""
        return getattr(self.generator, "classes", 0)

    @property
    def _penalty_mode(self) -> str | None:
        return getattr(self.loss, "penalty_mode", None)

    def check_run(self, run: RunConfig) -> None:
        """ValueError with the reason where this cannot be run so."""
        if run.gradient_checkpointing and self._penalty_mode == "jvp":
            raise ValueError(
                "gradient_checkpointing cannot go with loss.penalty_mode 'jvp', whose tangents are gone when a block "
                "is recomputed; take one of them, or loss.penalty_mode 'exact' or 'finite-difference'"
            )
        if run.init and run.resume not in (None, "latest"):
            raise ValueError(
                f"init is {run.init!r} and resume is {run.resume!r}: a run that goes on from a checkpoint has its "
                "weights; give one of the two"
            )

    def check_processes(self, processes: int) -> None:
        """ValueError unless the batches can be divided evenly among this many processes."""
        for name in ("batch_d", "batch_g"):
            if getattr(self, name) % (processes * self.accumulate):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of accumulate ({self.accumulate}) times "
                    f"the number of processes ({processes})"
                )


@dataclass(frozen=True)
class RunConfig:
    """Where and how a recipe runs."""

    data: str
    """Folder or ZIP file of images, shards (.tar) or .parquet files (several by a pattern, 'x-{000..009}.tar'), hf:NAME
    on the Hugging Face hub, CIFAR-10 archive (.tar.gz), or "digits" for scikit-learn's scanned digits."""
    out: str
    """Folder of the run: config.json, log.jsonl, TensorBoard events, samples/, checkpoints/, curves.png. On the command
    line, a numbered folder in runs/ if it is not given."""
    resume: str | None = None
    """A checkpoint folder, or "latest" for the newest of the run (starts afresh if it has none)."""
    init: str | None = None
    """A run, a checkpoint or an export whose weights a new run starts from: those that fit by name and shape. Beside
    resume "latest", it counts only where there is no checkpoint yet."""
    init_little: bool = False
    """Take them even if they are less than 5 percent of the generator or of the discriminator."""
    wandb: str | None = None
    """A project of Weights & Biases that gets the numbers as well (pip install wandb)."""
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device."""
    backend: str | None = None
    """Attention backend of natten_ext ("auto", "reference", "cpu"...); None leaves its choice."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    tf32: bool = False
    """Let float32 matrix products on NVIDIA GPUs round their inputs to TF32."""
    gradient_checkpointing: bool = False
    """Recompute the activations of transformer blocks in the backward pass: less memory, more time."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do where a loss term or a gradient is not finite: stop, or skip the update and count it."""
    max_skips: int = 100
    """Skipped updates in a row, of one network with the same terms, after which training stops all the same."""
    log_every: int = 50
    """Steps between lines of the logs, which hold the means since the last."""
    sample_every: int | None = None
    """Steps between sample grids of the averaged generator, always from the same z; None for a twentieth of the run."""
    sample_count: int = 64
    """Images of a grid."""
    metric: str = "random"
    """Network of the distance to real images: "random" (fixed random weights), "lite1", or "judge:FILE"."""
    metric_every: int = 0
    """Steps between measurements of that distance; 0 for never."""
    metric_images: int = 2000
    """Generated images per measurement, and the most real ones that are used."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, None for a tenth of the run; the last step, or the one where it is stopped, always
    gets one."""
    keep: int = 3
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        for name in ("log_every", "sample_every", "sample_count", "checkpoint_every", "keep", "max_skips"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("threads", "metric_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        for name in ("data", "init", "resume"):
            if getattr(self, name) == "":
                raise ValueError(names_nothing(name))

    def with_intervals(self, steps: int) -> RunConfig:
        """This, with the intervals that are None as numbers: 20 sample grids and 10 checkpoints in `steps` steps."""
        return dataclasses.replace(
            self,
            sample_every=self.sample_every or max(1, math.ceil(steps / 20)),
            checkpoint_every=self.checkpoint_every or max(1, math.ceil(steps / 10)),
        )


@dataclass(frozen=True)
class Preset:
    """A recipe with a name, and where it comes from."""

    recipe: TrainConfig
    origin: Literal["published", "ours"]
    """"published" recipes repeat published settings; the others follow their rules at another size."""
    note: str = ""
    """One line for the list of presets."""


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values for JSON (tuples become lists); a choice's class is named by `"kind"`."""
    values = {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    kind = registry.kind(config)
    return values if kind is None else {"kind": kind} | values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _check_finite(value: Any, name: str = "") -> None:
    """ValueError with the dotted name of the first number in a `to_dict` form that is NaN or infinite."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_finite(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for item in value:
            _check_finite(item, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")


def from_dict(config: type[T], values: dict[str, Any]) -> T:
    """The configuration of class `config` from `to_dict`'s form; missing keys take their default, unknown ones
    raise.
    """
    values = {name: value for name, value in values.items() if name != "kind"}
    hints = typing.get_type_hints(config)
    names = {f.name for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - names):
        raise ValueError(f"{config.__name__} has no {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    return config(**{name: _convert(name, hints[name], value) for name, value in values.items()})


def _convert(name: str, hint: Any, value: Any) -> Any:
    if name in registry.CHOICES and isinstance(value, dict):
        return from_dict(registry.config_class(name, value.get("kind")), value)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)  # type: ignore[arg-type]
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    tuples = any(typing.get_origin(option) is tuple for option in options)
    return _tuple(value) if tuples and isinstance(value, list) else value


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The dotted names whose values differ between two `to_dict` forms, each with its "old -> new"."""
    found: dict[str, str] = {}
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = f"{a} -> {b}"
    return found
