"""Which class each configuration builds, by name. A new model or loss is one more line here.

The names stand in the JSON form of a configuration (`"kind"`) and on the command line (`--generator NAME`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Union

from gans.losses import adversarial, path_length
from gans.models import fastgan, gat, projected, stylenat, stylenat_discriminator, transgan, vitgan


class Entry(NamedTuple):
    """A frozen dataclass, and what makes a model or a loss of it."""

    config: type
    build: Callable[[Any], Any]


CHOICES: dict[str, dict[str, Entry]] = {
    "generator": {
        "transgan": Entry(transgan.GeneratorConfig, transgan.Generator),
        "vitgan": Entry(vitgan.ViTGeneratorConfig, vitgan.Generator),
        "stylenat": Entry(stylenat.StyleNATGeneratorConfig, stylenat.Generator),
        "fastgan": Entry(fastgan.FastGANGeneratorConfig, fastgan.Generator),
        "gat": Entry(gat.GATGeneratorConfig, gat.Generator),
    },
    "discriminator": {
        "transgan": Entry(transgan.DiscriminatorConfig, transgan.Discriminator),
        "vitgan": Entry(vitgan.ViTDiscriminatorConfig, vitgan.Discriminator),
        "stylenat": Entry(stylenat_discriminator.StyleNATDiscriminatorConfig, stylenat_discriminator.Discriminator),
        "projected": Entry(projected.ProjectedDiscriminatorConfig, projected.Discriminator),
        "gat": Entry(gat.GATDiscriminatorConfig, gat.Discriminator),
    },
    "loss": {
        "standard": Entry(adversarial.LossConfig, adversarial.GANLoss),
        "path-length": Entry(path_length.PathLengthLossConfig, path_length.PathLengthLoss),
    },
}
"""What can stand in the fields `generator`, `discriminator` and `loss` of a recipe."""

_NAMED = {entry.config: (name, entry) for table in CHOICES.values() for name, entry in table.items()}


def _union(field: str) -> Any:
    return Union[tuple(entry.config for entry in CHOICES[field].values())]  # noqa: UP007


GeneratorConfig = _union("generator")
DiscriminatorConfig = _union("discriminator")
LossConfig = _union("loss")


def build(config: object) -> Any:
    """The model or loss that `config` describes; TypeError for a configuration nobody registered."""
    if type(config) not in _NAMED:
        known = ", ".join(sorted(other.__qualname__ for other in _NAMED))
        raise TypeError(f"config is a {type(config).__qualname__}; known are {known}")
    return _NAMED[type(config)][1].build(config)


def kind(config: object) -> str | None:
    """The registered name of a configuration's class; None for one that is not a choice."""
    return _NAMED[type(config)][0] if type(config) in _NAMED else None


def config_class(field: str, name: object) -> type:
    """The class that is called `name` among the choices of a field; ValueError for another name."""
    if name not in CHOICES[field]:
        raise ValueError(f"the kind of {field} is {name!r}; it must be one of {', '.join(CHOICES[field])}")
    return CHOICES[field][name].config  # type: ignore[index]
