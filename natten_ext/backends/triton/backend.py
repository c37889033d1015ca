"""The ``triton`` backend as ``natten_ext.backends.choice`` sees it.

Importing this module does not import Triton; the kernels are imported when the first problem runs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...orders import Order
from ..support import asked_once, cannot_take, cannot_use_gpu

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cannot_run(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why this backend can't run a problem; empty if it can."""
    if device.type not in ("cuda", "cpu"):
        return f"device must be cuda, got {device.type}"
    if device.type == "cpu" and not _interpreted():
        return "device must be cuda, got cpu (Triton runs there only in its interpreter, with TRITON_INTERPRET=1)"
    if missing := _missing():
        return missing
    if device.type == "cuda" and (reason := cannot_use_gpu(device)):
        return reason
    return cannot_take(dtype, DTYPES, head_dim)


def run(order: Order, arguments: Sequence[Any]) -> tuple[torch.Tensor | None, ...]:
    """The results of an order, None where one is not asked for; RuntimeError where it can't run."""
    global _planned_run
    if _planned_run is None:
        if missing := _missing():
            raise RuntimeError(f"backend 'triton' cannot run this: {missing}")
        _planned_run = importlib.import_module(".plans", __package__).run
    return _planned_run(order, arguments)


_planned_run: Callable[..., tuple[torch.Tensor | None, ...]] | None = None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@asked_once
def _missing() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); install natten_ext[triton]"
    return ""
