"""Which implementation runs a problem, and why.

Every backend with operators of its own is a module with ``cannot_run(device, dtype, head_dim) -> str`` (empty: it
can) and ``run(order, arguments)``, which does the work of the operators of ``natten_ext.operators``; None where C++
does it.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from ..checks import shown
from ..geometry import KINDS, Grid, Neighborhood
from . import cpu, cuda, matmul
from .support import constant_when_compiled
from .triton import backend as triton

FUSED: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "matmul": matmul}
"""By name, the backends with operators of their own: none keeps the scores of a whole problem (docs/kernels.md)."""

# On CPU tensors these run in an interpreter or an emulator, and only when they are asked for by name.
_MADE_FOR_GPUS = ("cuda", "triton")

NAMES = (*FUSED, "reference")

SHARING = {"cuda": (Grid.kind, Neighborhood.kind)} | dict.fromkeys(("triton", "cpu", "matmul", "reference"), KINDS)
"""By backend, the kinds of neighborhood whose heads may share keys there."""

TAKES = dict.fromkeys(NAMES, KINDS) | {"matmul": matmul.KINDS}
"""By backend, the kinds of neighborhood that it runs."""

ENVIRONMENT_VARIABLE = "NATTEN_EXT_BACKEND"

# Read at import and changed by use_backend. A plain module attribute, because torch.compile guards on it. An unknown
# name is refused where it is used: commands, which import this package first, can then say so in a line.
_override: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None

_warned: set[str] = set()


@dataclass(frozen=True)
class BackendStatus:
    """One backend's answer for a kind of problem. ``reason`` is empty when it is available."""

    name: str
    available: bool
    reason: str


def list_backends(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    neighborhood: str = "neighborhood",
    keys: int = 256,
) -> tuple[BackendStatus, ...]:
    """Every backend, and why those that can't run this kind of problem can't.

    Args:
        device, dtype, head_dim: of query, key and value.
        neighborhood: "full" (``attention``, ``l2_attention``), "grid" (``grid_attention``) or "neighborhood"
            (``neighborhood_attention``, ``na2d``).
        keys: that a query attends.

    Returns:
        In the order in which ``"auto"`` tries them: it takes the first that is available. After ``reference``, which
        can run anything, come those that run only when they are asked for by name.

    Raises:
        TypeError: ``dtype`` is no torch.dtype, or ``head_dim`` or ``keys`` no int.
        ValueError: ``neighborhood`` is none of the three; ``head_dim`` or ``keys`` is less than 1.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {shown(dtype)}")
    for name, number in (("head_dim", head_dim), ("keys", keys)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an int, got {shown(number)}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not isinstance(neighborhood, str) or neighborhood not in KINDS:
        raise ValueError(f"neighborhood must be one of {KINDS}, got {shown(neighborhood)}")
    device = torch.device(device)
    order = _candidates(device, dtype, head_dim, neighborhood, keys)
    reasons = [(name, _reason(name, device, dtype, head_dim, neighborhood)) for name in order]
    return tuple(BackendStatus(name, not reason, reason) for name, reason in reasons)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use backend ``name`` wherever ``backend`` is None, inside a ``with`` block (for the whole process).

    Goes before the environment variable ``NATTEN_EXT_BACKEND``. Raises ValueError for an unknown name.
    """
    global _override
    check_name(name)
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def check_name(name: str, said_by: str = "backend") -> None:
    """Raise ValueError unless ``name``, the value of ``said_by``, is "auto" or a backend of this package."""
    if not isinstance(name, str) or name not in ("auto", *NAMES):
        raise ValueError(f"{said_by} must be one of {('auto', *NAMES)}, got {shown(name)}")


def check_environment() -> None:
    """Raise ValueError if an environment variable has a value that every call refuses, for commands to say at once."""
    _default()
    try:
        cpu.instruction_set()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _default() -> str:
    """What ``use_backend`` or the environment says, else "auto". ValueError for an unknown name, of the environment."""
    name = _override or "auto"
    check_name(name, ENVIRONMENT_VARIABLE)
    return name


def choose(
    name: str | None, device: torch.device, dtype: torch.dtype, head_dim: int, neighborhood: str, keys: int
) -> str:
    """The backend that runs a problem: ``name``, what ``use_backend`` or the environment says, or the first that can.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that can't run the problem.
    """
    if name is None:
        name = _default()
    else:
        check_name(name)
    if name != "auto":
        if reason := _reason(name, device, dtype, head_dim, neighborhood):
            raise RuntimeError(f"backend {name!r} cannot run this: {reason}")
        return name
    reasons = []
    for candidate in _candidates(device, dtype, head_dim, neighborhood, keys):
        reason = _reason(candidate, device, dtype, head_dim, neighborhood)
        if not reason:
            break
        reasons.append(f"{candidate}: {reason}")
    if candidate == "reference" and device.type != "cpu":
        _warn_once(
            f"natten_ext runs unfused on {device.type} (slow, memory grows with tokens x keys): {'; '.join(reasons)}"
        )
    return candidate


def _candidates(
    device: torch.device, dtype: torch.dtype, head_dim: int, neighborhood: str, keys: int
) -> tuple[str, ...]:
    """All backends in the order in which ``auto`` tries them; it never gets past ``reference``."""
    if device.type == "cpu":
        return ("cpu", "reference", "matmul", *_MADE_FOR_GPUS)
    kernels = _gpu_kernels(dtype, head_dim, neighborhood)
    library_first = _is_for_library(dtype, head_dim, neighborhood, keys)
    return (*(("matmul", *kernels) if library_first else (*kernels, "matmul")), "cpu", "reference")


def _gpu_kernels(dtype: torch.dtype, head_dim: int, neighborhood: str) -> tuple[str, str]:
    """The GPU backends with kernels, the faster one first.

    As measured on an H100 on the named shapes (docs/gpu.md), and taken for other GPUs until they are. For full
    attention and windows in half precision ``triton`` takes 0.3 to 0.9 times the time of ``cuda``, all orders together,
    from 16 channels on. For neighborhoods the two take the same within a tenth; all tests of ``cuda`` have run there,
    and in float64, for gradient checks, only its. In float32 the two were alike; the kernels of ``cuda`` have a half to
    a fifth of the instructions since.
    """
    wide = neighborhood != "neighborhood" and dtype.itemsize == 2 and head_dim >= 16
    return ("triton", "cuda") if wide else ("cuda", "triton")


def _is_for_library(dtype: torch.dtype, head_dim: int, neighborhood: str, keys: int) -> bool:
    """Whether ``matmul`` comes before the kernels on a GPU.

    On an H100 the float32 kernels that were measured took 5 to 12 times as long as those for bfloat16, and with them a
    discriminator's step with its penalty took longer than in plain PyTorch (docs/gpu.md). Neither today's nor
    ``matmul`` has run on one. By arithmetic (docs/kernels.md) ``matmul`` is ahead from 65 channels on, where kernels
    pad to 96 or 128 and their tiles leave room for few warps, and with enough keys for its many launches. A table
    takes keys times keys numbers of each head, so windows may not be too large.
    """
    most = 1024 if neighborhood == Grid.kind else math.inf
    return dtype == torch.float32 and neighborhood in matmul.KINDS and head_dim >= 65 and 128 <= keys <= most


def _reason(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, neighborhood: str) -> str:
    """Why a backend can't run a problem; empty if it can."""
    if neighborhood not in TAKES[name]:
        return f"neighborhood must be one of {TAKES[name]}, got {neighborhood}"
    return "" if name == "reference" else FUSED[name].cannot_run(device, dtype, head_dim)


@constant_when_compiled
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=5)
