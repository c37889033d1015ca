"""What NATTEN's functions take, as the functions of this package take it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..backends.support import constant_when_compiled
from ..checks import extents_of, flags_of, shown
from ..geometry import MAP_AXES, Extents

Size = int | tuple[int, ...] | list[int]
"""Of all map axes, or one per axis; a list is never one entry per group of heads, as in ``neighborhood_attention``."""
Flags = bool | tuple[bool, ...] | list[bool] | None

BACKENDS = frozenset(
    f"{kernels}-{kind}" for kernels in ("cutlass", "hopper", "blackwell", "flex") for kind in ("fna", "fmha")
)
"""NATTEN's names of its backends."""

_warned = False


def sizes(name: str, size: Any, axes: int) -> Extents:
    """One number per map axis."""
    return extents_of(name, tuple(size) if isinstance(size, list) else size, axes)


def flags(name: str, flag: Any, axes: int) -> tuple[bool, ...]:
    """One bool per map axis; None is False."""
    flag = False if flag is None else flag
    return flags_of(name, tuple(flag) if isinstance(flag, list) else flag, axes)


def own_backend(backend: Any, tuning: dict[str, tuple[Any, Any]]) -> Any:
    """The backend of this package that is asked for; None where it is one of NATTEN's.

    Warns, once in a process, of that and of ``tuning``, given and default value of each, that is not the default.
    """
    names = [name for name, (given, default) in tuning.items() if given != default]
    if isinstance(backend, str) and backend in BACKENDS:
        names.append("backend")
        backend = None
    if names:
        _warn_once(", ".join(names))
    return backend


def refuse(name: str, value: Any, what: str, *, allowed: bool) -> None:
    """NotImplementedError that names the argument, unless it is allowed."""
    if not allowed:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else shown(value)
        raise NotImplementedError(f"{name}: natten_ext does not support {what}, got {got}")


@constant_when_compiled
def _warn_once(names: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"natten_ext takes NATTEN's tuning of its kernels and ignores it: {names} (said once)",
            RuntimeWarning,
            stacklevel=4,
        )


def for_axes(name: str, make: Callable[[int], Callable]) -> tuple[Callable, ...]:
    """The functions that ``make`` makes for one, two and three map axes.

    They are called ``name``, with ``{axes}`` filled in there and in their docstring.
    """
    functions = []
    for axes in range(1, MAP_AXES + 1):
        function = make(axes)
        function.__name__ = function.__qualname__ = name.format(axes=axes)
        function.__doc__ = function.__doc__.replace("{axes}", str(axes))
        functions.append(function)
    return tuple(functions)
