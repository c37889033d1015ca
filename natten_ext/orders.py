"""The orders of differentiation: what each takes and gives, written here for Python and in csrc/operators.h for C++.

Tensors are sequences ``(batch, tokens, heads, head_dim)`` or maps ``(batch, height, width, heads, head_dim)``, tables
``(heads, rows, columns)``. Those of keys and values may have fewer heads, each shared by as many adjacent query heads,
which have one window. The formulas are in docs/double_backward.md.

``lse`` is each row's log-sum-exp in two parts ``(2, batch, heads, *tokens)``, in the units of the kernels: the score,
times log2(e), from which weights were counted (``base``, about the largest), and log2 of the sum of those weights
(``log_sum``). Added up they would round: scores of 1e5 would leave float32 weights two digits.

``natural_lse`` is the log-sum-exp as users get it, ``(batch, heads, *tokens)``: of the true score (for l2 -s|q-k|^2),
in natural units. ``grad_lse`` is its gradient: what operators differentiate is ``output`` and ``natural_lse``.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

INPUTS = {"query": Tensor, "key": Tensor, "value": Tensor, "bias": Tensor | None}
"""What the output is differentiated by."""
RESULTS = {"output": Tensor, "lse": Tensor}
"""What the forward gives the other orders."""
CHOICES = {"neighborhood": list[int], "l2": bool, "scale": float}
"""The integer code of ``natten_ext.geometry``, whether the score is "l2" rather than "dot", the factor of the score."""

# `l2` is no string because the stable ABI, as of torch 2.13, loses the memory of every string that it hands to C++.
_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[int]: "int[]", list[bool]: "bool[]", bool: "bool", float: "float",
}  # fmt: skip


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which scores, sums and the log-sum-exp of tensors of ``dtype`` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Order:
    """An operator of every fused backend: ``natten_ext_cpu::backward`` and so on.

    ``operands`` is a named tuple of its arguments. ``results`` names the tensors that it returns; where ``needs`` does
    not ask for one, an empty tensor is in its place.
    """

    def __init__(self, name: str, operands: dict[str, Any], results: Sequence[str]) -> None:
        self.name = name
        self.types = operands
        self.operands = NamedTuple("Operands", operands.items())
        self.results = tuple(results)
        self.query, self.l2 = (list(operands).index(name) for name in ("query", "l2"))
        """Their places among the arguments. The key comes after the query."""

    def schema(self, **more: type) -> str:
        """As torch declares operators; ``more`` are arguments after the operands."""
        arguments = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in (self.types | more).items())
        return f"({arguments}) -> ({', '.join(f'Tensor {name}' for name in self.results)})"

    def asked(self, operands: Any) -> list[bool]:
        """Which results a call asks for."""
        return [*[True] * len(RESULTS), operands.return_lse] if self.name == "forward" else operands.needs

    def checked(self, arguments: Sequence[Any]) -> Any:
        """The operands, by name; TypeError or ValueError for what torch lets through and no backend can take."""
        operands = self.operands(*arguments)
        for (name, kind), operand in zip(self.types.items(), operands, strict=True):
            if kind is Tensor and operand is None:
                raise TypeError(f"{name} must be a tensor, got None")
        if "needs" in self.types and len(operands.needs) != len(self.results):
            raise ValueError(
                f"needs must have {len(self.results)} entries, one per gradient, got {len(operands.needs)}"
            )
        return operands


_GRADIENTS = [f"grad_{name}" for name in INPUTS]
_OUTGOING = {"grad_output": Tensor, "grad_lse": Tensor | None}

FORWARD = Order("forward", INPUTS | CHOICES | {"return_lse": bool}, [*RESULTS, "natural_lse"])
BACKWARD = Order("backward", _OUTGOING | INPUTS | RESULTS | CHOICES | {"needs": list[bool]}, _GRADIENTS)
# Cotangents belong to the gradients of the backward; one is absent where its gradient was not used.
DOUBLE_BACKWARD = Order(
    "double_backward",
    {f"cot_{name}": Tensor | None for name in INPUTS} | BACKWARD.types,
    [*(f"grad_{name}" for name in _OUTGOING), *_GRADIENTS],
)
ORDERS = (FORWARD, BACKWARD, DOUBLE_BACKWARD)

MEANING = 2
"""Raised when operands of the same schema come to mean something else, say the numbers of a neighborhood's code."""

INTERFACE = zlib.crc32(repr((MEANING, [order.schema() for order in ORDERS])).encode())
"""What compiled libraries must agree with: setup.py compiles it in, and one with another number is refused."""
