"""Checks of operands before a launch, as csrc/operators.h makes them for the compiled backends.

The public functions have checked their arguments already. This guards memory against callers that go straight to the
operators: a kernel would read and write wherever a wrong size leads it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ...checks import check_dense, grid_of, neighborhood_of
from ...geometry import FULL, GRID, NEIGHBORHOOD, AnyNeighborhood, Full

_COMMON = ("query", "key", "value", "bias")
OPERANDS = {
    "forward": _COMMON,
    "backward": ("grad_output", *_COMMON, "output", "lse"),
    "double_backward": ("cot_query", "cot_key", "cot_value", "cot_bias", "grad_output", *_COMMON, "output", "lse"),
}
"""The first arguments of each order; the neighborhood's code follows."""

_LIKE = {
    "value": "key", "grad_output": "query", "output": "query",
    "cot_query": "query", "cot_key": "key", "cot_value": "value", "cot_bias": "bias",
}  # fmt: skip


def check_operands(order: str, arguments: Sequence[Any]) -> None:
    """Raise TypeError or ValueError unless the operands fit each other and the neighborhood."""
    names = OPERANDS[order]
    operands, code = dict(zip(names, arguments, strict=False)), arguments[len(names)]
    given = {name: tensor for name, tensor in operands.items() if tensor is not None}
    for name, tensor in given.items():
        check_dense(name, tensor)
    query, key, bias = operands["query"], operands["key"], operands["bias"]
    dims = 4 if tuple(code) == (FULL,) else 5
    if query.dim() != dims or key.dim() != dims:
        raise ValueError(f"query and key must have {dims} dimensions for neighborhood code {list(code)}")
    if 0 in query.shape[-2:] or key.shape[1] == 0:
        raise ValueError(f"there must be a key, a head and a channel, got {tuple(query.shape)}, {tuple(key.shape)}")
    batch, *tokens, heads, head_dim = query.shape
    keys = key.shape[1:2] if dims == 4 else tokens
    _require("key", key, (batch, *keys, heads, head_dim), query.dtype, query.device)
    neighborhood = _decoded(tuple(code), tuple(tokens), heads)
    if bias is not None:
        if isinstance(neighborhood, Full):
            raise ValueError("full attention takes no bias")
        table = (heads, *(2 * extent - 1 for extent in neighborhood.kernel))
        dtype = bias.dtype if bias.dtype == torch.float32 else query.dtype
        _require("bias", bias, table, dtype, query.device)
    for name, tensor in given.items():
        if name in _LIKE:
            like = operands[_LIKE[name]]
            if like is None:
                raise ValueError(f"{name} must be absent where {_LIKE[name]} is")
            _require(name, tensor, like.shape, like.dtype, like.device)
    if "lse" in operands:
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        _require("lse", operands["lse"], (2, batch, heads, *tokens), dtype, query.device)
        if not operands["lse"].is_contiguous():
            raise ValueError("lse must be contiguous")


def _require(name: str, tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
        raise ValueError(
            f"{name} must be {tuple(shape)} {dtype} on {device}, got {tuple(tensor.shape)} {tensor.dtype} on"
            f" {tensor.device}"
        )


@functools.lru_cache(maxsize=4096)
def _decoded(code: tuple[int, ...], extents: tuple[int, ...], heads: int) -> AnyNeighborhood:
    """The neighborhood of a code, found to fit a map of these extents."""
    kind, values = code[:1], code[1:]
    if kind == (FULL,) and not values:
        return Full()
    if kind == (GRID,) and len(values) == 2:
        return grid_of(extents, values)
    if kind == (NEIGHBORHOOD,) and len(values) == 4 * heads:
        quads = [values[i : i + 4] for i in range(0, len(values), 4)]
        return neighborhood_of(extents, heads, [q[:2] for q in quads], [q[2:] for q in quads])
    raise ValueError(f"neighborhood code {list(code)} must be [0], [1, height, width] or [2, four values per head]")
