"""Which feature network a name stands for.

To add one whose maps a projected discriminator can look at, write a `MapNetwork` and give it a name with `register`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gans.features.inception import InceptionVectors
from gans.features.judge import JudgeVectors
from gans.features.lite1 import Lite1Maps, Lite1Vectors
from gans.features.network import MapNetwork, VectorNetwork
from gans.features.random_convolutions import RandomMaps, RandomVectors
from gans.features.timm_maps import TimmMaps

VectorName = Literal["judge", "lite1", "inception", "random"]

MAPS: dict[str, Callable[[], MapNetwork]] = {"lite1": Lite1Maps, "random": RandomMaps}
"""Networks that give maps. `timm:NAME` needs no entry."""


def register(name: str, make: Callable[[], MapNetwork]) -> None:
    """Makes a network that gives maps known under a name; ValueError if it is taken."""
    if name in MAPS or name.startswith("timm:"):
        raise ValueError(f"features {name!r} are there already")
    MAPS[name] = make


def check_maps(name: str) -> None:
    """ValueError unless `make_maps` knows the name."""
    if name not in MAPS and not name.startswith("timm:"):
        raise ValueError(f"features is {name!r}; it must be one of {', '.join(MAPS)} or timm:NAME")


def make_maps(name: str) -> MapNetwork:
    """The network called `name` that gives maps, frozen; "timm:NAME" is network NAME of timm."""
    check_maps(name)
    network = TimmMaps(name.removeprefix("timm:")) if name.startswith("timm:") else MAPS[name]()
    return network.requires_grad_(False).train()


def make_vectors(
    name: VectorName, *, judge: Path | None = None, inception_weights: Path | None = None
) -> VectorNetwork:
    """The network called `name` that gives vectors, frozen; `judge` is the file that the judge is in."""
    if name == "judge" and judge is None:
        raise ValueError("network judge needs its file: --judge FILE, made with python -m gans train-judge")
    makers: dict[str, Callable[[], VectorNetwork]] = {
        "judge": lambda: JudgeVectors(judge),  # type: ignore[arg-type]
        "lite1": Lite1Vectors,
        "inception": lambda: InceptionVectors(inception_weights),
        "random": RandomVectors,
    }
    if name not in makers:
        raise ValueError(f"network is {name!r}; it must be one of {', '.join(makers)}")
    return makers[name]().requires_grad_(False).train()
