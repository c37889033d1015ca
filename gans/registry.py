"""Which class each configuration builds. A new model or loss is one more line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gans import losses, transgan

BUILDERS: dict[type, Callable[[Any], Any]] = {
    transgan.GeneratorConfig: transgan.Generator,
    transgan.DiscriminatorConfig: transgan.Discriminator,
    losses.WGANGPConfig: losses.WGANGP,
}


def build(config: object) -> Any:
    """The model or loss that `config` describes; TypeError for a configuration nobody registered."""
    try:
        builder = BUILDERS[type(config)]
    except KeyError:
        known = ", ".join(sorted(kind.__qualname__ for kind in BUILDERS))
        raise TypeError(f"config is a {type(config).__qualname__}; known are {known}") from None
    return builder(config)
