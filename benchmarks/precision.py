"""The number formats that are compared: torch's dtypes, and float32 with its products on the matrix units (TF32)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
}


@contextmanager
def use_precision(name: str) -> Iterator[torch.dtype]:
    """Set torch's own switch for TF32 inside a ``with`` block; gives the dtype of the tensors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield PRECISIONS[name]
    finally:
        torch.set_float32_matmul_precision(before)
