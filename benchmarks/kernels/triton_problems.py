"""The passes of a named shape (``benchmarks/shapes.py``) on empty tensors, for the commands beside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from natten_ext.backends.triton.launch import Launch
from natten_ext.backends.triton.plans import planned
from natten_ext.orders import BACKWARD, DOUBLE_BACKWARD, FORWARD, Order, accumulation_dtype

ORDERS = ("forward", "backward", "double")
DTYPES = ("bfloat16", "float16", "tf32", "float32", "float64")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name in ``DTYPES``, after setting whether torch allows TF32 for it."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
    return torch.float32 if name == "tf32" else getattr(torch, name)


def planned_orders(shape: Any, dtype: torch.dtype, orders: Iterable[str] = ORDERS) -> Iterator[Launch]:
    """The launches of the orders of a shape, with all gradients and cotangents, on tensors without data."""
    for order, arguments in orders_of(shape, dtype, "meta", orders):
        yield planned(order, order.operands(*arguments))[0]


def orders_of(
    shape: Any, dtype: torch.dtype, device: str, orders: Iterable[str] = ORDERS
) -> Iterator[tuple[Order, tuple]]:
    """The orders of a shape and their arguments, empty tensors, with all gradients and cotangents."""
    query = torch.empty(shape.query_shape, dtype=dtype, device=device)
    key, value = (torch.empty(shape.key_shape, dtype=dtype, device=device) for _ in range(2))
    bias = torch.empty(shape.table_shape, dtype=dtype, device=device) if shape.table else None
    batch, *tokens, heads, head_dim = shape.query_shape
    row_dtype = accumulation_dtype(dtype)
    lse = torch.empty((2, batch, heads, *tokens), dtype=row_dtype, device=device)
    choices = shape.neighborhood.encode(), shape.score == "l2", head_dim**-0.5
    inputs = query, key, value, bias
    needs = [True, True, True, bias is not None]
    backward = query, None, *inputs, query, lse, *choices
    arguments = {
        "forward": (FORWARD, (*inputs, *choices, False)),
        "backward": (BACKWARD, (*backward, needs)),
        "double": (DOUBLE_BACKWARD, (*inputs, *backward, [True, False, *needs])),
    }
    for order in ORDERS:
        if order in orders:
            yield arguments[order]
