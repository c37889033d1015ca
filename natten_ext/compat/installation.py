"""This package in the place of NATTEN: ``import natten`` finds it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..checks import shown
from . import context, flops, natten_014, natten_017, natten_021, unfused
from .arguments import Size, flags, sizes

Namespace = dict[str, Any]


def install(version: str = "0.17.5") -> None:
    """Let ``import natten`` find this package, in this process from here on.

    ``natten`` and its modules ``functional``, ``context``, ``flops``, ``modules``, ``types``, ``utils`` and some more
    can then be imported, ``importlib.util.find_spec("natten")`` finds the first, and
    ``importlib.metadata.version("natten")`` says the version. It goes before a NATTEN that is installed. Another
    process, such as a worker that was not forked, needs a call of its own.

    Args:
        version: of NATTEN to pass for. All names of all versions are there; it decides on those that differ: ``na1d``,
            ``na2d``, ``na3d`` and the modules are those of 0.21 from "0.20" on, and else those of 0.17, but that before
            "0.17" modules have a table unless told otherwise and pad small maps.

    Raises:
        TypeError, ValueError: ``version`` is no version.
        RuntimeError: ``natten`` is imported already, and is not this package.
    """
    release = _release(version)
    if "natten" in sys.modules and not isinstance(getattr(sys.modules["natten"], "__loader__", None), _Natten):
        raise RuntimeError("natten is imported already: call natten_ext.compat.install() before whatever imports it")
    uninstall()
    sys.meta_path.insert(0, _Natten(version, _modules(version, release)))


def uninstall() -> None:
    """Undo ``install``, but for what has imported the names already. Without effect where there is nothing to undo."""
    for finder in [finder for finder in sys.meta_path if isinstance(finder, _Natten)]:
        sys.meta_path.remove(finder)
        for name in finder.modules:
            sys.modules.pop(name, None)


def _release(version: Any) -> tuple[int, int]:
    if not isinstance(version, str):
        raise TypeError(f"version must be a str such as '0.17.5', got {shown(version)}")
    try:
        major, minor, *_ = map(int, version.split("+")[0].split("."))
    except ValueError:
        raise ValueError(f"version must be numbers and dots such as '0.17.5', got {shown(version)}") from None
    return major, minor


def _modules(version: str, release: tuple[int, int]) -> dict[str, Namespace]:
    """What each module holds, by its name."""
    generation = natten_021 if release >= (0, 20) else natten_017
    with_modules = natten_014 if release < (0, 17) else generation
    modules = {name: getattr(with_modules, name) for name in (f"NeighborhoodAttention{axes}D" for axes in (1, 2, 3))}
    fused = {name: getattr(generation, name) for name in ("na1d", "na2d", "na3d")}
    fused |= {name: getattr(natten_021, name) for name in ("attention", "merge_attentions")}
    functional = _public(unfused) | _public(natten_014) | fused
    functional = {name: value for name, value in functional.items() if name not in modules}
    functional["neighborhood_attention_generic"] = natten_021.neighborhood_attention_generic
    switches = _public(context)
    found = {
        "natten": fused | modules | switches | {"__version__": version, "HAS_LIBNATTEN": True},
        "natten.functional": functional,
        "natten.modules": modules,
        "natten.context": switches,
        "natten.flops": _public(flops),
        "natten.types": _types(),
        "natten.utils": _utilities(strides=generation is natten_021),
        "natten.utils.checks": _utilities(strides=generation is natten_021),
        "natten.utils.log": {"get_logger": logging.getLogger},
    }
    if release < (0, 17):  # code asks for the module to find out which it has
        del found["natten.context"]
    if generation is not natten_021:  # there the names of functions
        found |= {f"natten.{name}{axes}d": modules for name in ("na", "natten") for axes in (1, 2, 3)}
    return found


def _public(module: ModuleType) -> Namespace:
    """The functions and classes that a module of this package makes for others."""
    made = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: value for name, value in made.items() if getattr(value, "__module__", "") == module.__name__}


def _types() -> Namespace:
    """Names for annotations."""
    found: Namespace = {}
    for name, entry in (("Dimension", int), ("CausalArg", bool)):
        of_axes = [tuple[(entry,) * axes] for axes in (1, 2, 3)]  # type: ignore[misc]
        for axes, of_map in enumerate([*of_axes, of_axes[0] | of_axes[1] | of_axes[2]], 1):
            prefix = f"{name}{axes}D" if axes <= 3 else name
            found |= {f"{prefix}Type": of_map, f"{prefix}TypeOrDed": entry | of_map}
    return found


def _utilities(strides: bool) -> Namespace:
    """Of ``natten.utils``, where ``check_all_args`` has a stride or none."""

    def check_all_args(na_dim: int, kernel_size: Size, *others: Any) -> tuple[Any, ...]:
        names = ("stride", "dilation", "is_causal") if strides else ("dilation", "is_causal")
        checked = [sizes("kernel_size", kernel_size, na_dim)]
        for name, value in zip(names, others, strict=True):
            checked.append(flags(name, value, na_dim) if name == "is_causal" else sizes(name, value, na_dim))
        return tuple(checked)

    def get_num_na_weights(kernel_size: tuple[int, ...]) -> int:
        return math.prod(kernel_size)

    return {"check_all_args": check_all_args, "get_num_na_weights": get_num_na_weights}


class _Natten(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the modules, and the distribution that they pass for."""

    def __init__(self, version: str, modules: dict[str, Namespace]):
        self.version, self.modules = version, modules

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.modules:
            return None
        inner = any(name.startswith(f"{fullname}.") for name in self.modules)
        return importlib.machinery.ModuleSpec(fullname, self, origin="natten_ext.compat", is_package=inner)

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "natten_ext in the place of NATTEN."
        for name in self.modules:
            if name.rpartition(".")[0] == module.__name__:  # NATTEN imports its modules with the first one
                importlib.import_module(name)
        # Of a function and a module of one name, `from natten import na2d` asks for the function.
        module.__dict__.update(self.modules[module.__name__])

    def find_distributions(self, context: Any = None) -> Iterable[Any]:
        return [_Distribution(self.version)] if getattr(context, "name", None) in (None, "natten") else []


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, version: str):
        self._metadata = f"Metadata-Version: 2.1\nName: natten\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._metadata if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        raise FileNotFoundError(f"natten is natten_ext.compat here, without a file {path}")
