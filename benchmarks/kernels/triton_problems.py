"""The passes of a named shape (``benchmarks/shapes.py``) on empty tensors, for the commands beside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from natten_ext.backends.triton import backward, double_backward, forward
from natten_ext.orders import BACKWARD, DOUBLE_BACKWARD, FORWARD

ORDERS = ("forward", "backward", "double")
DTYPES = ("bfloat16", "float16", "tf32", "float32", "float64")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name in ``DTYPES``, after setting whether torch allows TF32 for it."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
    return torch.float32 if name == "tf32" else getattr(torch, name)


def run_orders(shape: Any, dtype: torch.dtype, device: str, orders: Iterable[str] = ORDERS) -> None:
    """Run the passes of a shape on empty tensors, with all gradients and cotangents."""
    query = torch.empty(shape.query_shape, dtype=dtype, device=device)
    key, value = (torch.empty(shape.key_shape, dtype=dtype, device=device) for _ in range(2))
    bias = torch.empty(shape.table_shape, dtype=dtype, device=device) if shape.table else None
    batch, *tokens, heads, head_dim = shape.query_shape
    row_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lse = torch.empty((2, batch, heads, *tokens), dtype=row_dtype, device=device)
    choices = shape.neighborhood.encode(), shape.score == "l2", head_dim**-0.5
    inputs = query, key, value, bias
    needs = [True, True, True, bias is not None]
    if "forward" in orders:
        forward.forward(FORWARD.operands(*inputs, *choices, False))
    if "backward" in orders:
        backward.backward(BACKWARD.operands(query, None, *inputs, query, lse, *choices, needs))
    if "double" in orders:
        needs = [True, False, *needs]
        operands = DOUBLE_BACKWARD.operands(*inputs, query, None, *inputs, query, lse, *choices, needs)
        double_backward.double_backward(operands)
