"""Which implementation runs a problem, and why.

Every fused backend is a module with ``cannot_run(device_type, dtype, head_dim) -> str`` (empty: it can) and the
three functions ``forward``, ``backward`` and ``double_backward`` that ``natten_ext.ops`` calls.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from . import cpu, cuda, preferences
from .fused import cannot_use_gpu, capability_of
from .triton import backend as triton

FUSED: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu}
"""Fused backends by name, in the order in which ``auto`` tries them where ``preferences`` knows no better."""

# On CPU tensors these run in an interpreter or an emulator, and only when they are asked for by name.
_MADE_FOR_GPUS = ("cuda", "triton")

NAMES = (*FUSED, "reference")

ENVIRONMENT_VARIABLE = "NATTEN_EXT_BACKEND"

# Read at import and changed by use_backend. A plain module attribute, because torch.compile guards on it.
_override: str | None = None

_warned: set[str] = set()


@dataclass(frozen=True)
class BackendStatus:
    """One backend's answer for a kind of problem. ``reason`` is empty when it is available."""

    name: str
    available: bool
    reason: str


def backends(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64
) -> tuple[BackendStatus, ...]:
    """Every backend, in the order in which ``"auto"`` tries them, and why those that can't run this problem can't."""
    device_type = torch.device(device).type
    return tuple(_status(name, device_type, dtype, head_dim) for name in NAMES)


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


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is "auto" or a backend of this package."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}, got {name!r}")


def choose(
    name: str | None, device_type: str, dtype: torch.dtype, head_dim: int, neighborhood: str = "neighborhood"
) -> str:
    """The backend that runs a problem: ``name``, or by ``use_backend``, the environment, or what can run it.

    ``neighborhood`` is "full", "grid" or "neighborhood"; with dtype and head_dim it finds the fastest on a GPU.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that can't run the problem.
    """
    if name is None:
        name = _override or "auto"
    check_name(name)
    if name != "auto":
        status = _status(name, device_type, dtype, head_dim)
        if not status.available:
            raise RuntimeError(f"backend {name!r} cannot run this: {status.reason}")
        return name
    reasons = []
    for candidate in _candidates(device_type, dtype, head_dim, neighborhood):
        if device_type == "cpu" and candidate in _MADE_FOR_GPUS:
            continue
        status = _status(candidate, device_type, dtype, head_dim)
        if status.available:
            return candidate
        reasons.append(f"{candidate}: {status.reason}")
    if device_type != "cpu":
        _warn_once(
            f"natten_ext runs unfused on {device_type} (slow, memory grows with tokens x keys): {'; '.join(reasons)}"
        )
    return "reference"


def _candidates(device_type: str, dtype: torch.dtype, head_dim: int, neighborhood: str) -> tuple[str, ...]:
    """Fused backends in the order in which ``auto`` tries them."""
    if device_type != "cuda" or cannot_use_gpu():
        return tuple(FUSED)
    capability = "{}.{}".format(*capability_of(torch.cuda.current_device()))
    fastest = preferences.order(capability, neighborhood, str(dtype).removeprefix("torch."), head_dim)
    return (*fastest, *(name for name in FUSED if name not in fastest))


def _status(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> BackendStatus:
    reason = "" if name == "reference" else FUSED[name].cannot_run(device_type, dtype, head_dim)
    return BackendStatus(name, not reason, reason)


@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=5)


def _read_environment() -> str | None:
    name = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is not None:
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"environment variable {ENVIRONMENT_VARIABLE}: {error}") from None
    return name


_override = _read_environment()
