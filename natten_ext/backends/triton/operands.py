"""Checks of operands before a launch, as csrc/operators.h makes them for the compiled backends.

The public functions have checked their arguments already. This guards memory against callers that go straight to the
operators: a kernel would read and write wherever a wrong size leads it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ...checks import check_dense, check_windows, grid_of
from ...geometry import FULL, GRID, MAP_AXES, NEIGHBORHOOD, AnyNeighborhood, Full, Grid, Neighborhood, decode
from ...orders import INPUTS, accumulation_dtype

_LIKE = {"value": "key", "grad_output": "query", "output": "query"} | {f"cot_{name}": name for name in INPUTS}


def check_operands(operands: Any) -> None:
    """Raise TypeError or ValueError unless the operands of an order fit each other and the neighborhood."""
    given = {name: value for name, value in operands._asdict().items() if isinstance(value, torch.Tensor)}
    for name, tensor in given.items():
        check_dense(name, tensor)
    query, key, bias, code = operands.query, operands.key, operands.bias, operands.neighborhood
    full = tuple(code) == (FULL,)
    if key.dim() != query.dim() or not 4 <= query.dim() <= (4 if full else 6):
        dims = "4" if full else "4 to 6"
        raise ValueError(f"query and key must have {dims} dimensions for neighborhood code {list(code)}")
    if 0 in (*query.shape[-2:], key.shape[1], key.shape[-2]):
        raise ValueError(f"there must be a key, a head and a channel, got {tuple(query.shape)}, {tuple(key.shape)}")
    batch, *tokens, heads, head_dim = query.shape
    keys = key.shape[1:2] if full else tokens
    if heads % key.shape[-2]:
        raise ValueError(f"key must have heads that divide the query's {heads}, got {key.shape[-2]}")
    _require("key", key, (batch, *keys, key.shape[-2], head_dim), query.dtype, query.device)
    neighborhood = _decoded(tuple(code), tuple(tokens), heads)
    if neighborhood.sharing(heads // key.shape[-2]) != heads // key.shape[-2]:
        raise ValueError("heads that share a key head must have one window")
    if bias is not None:
        if isinstance(neighborhood, Full):
            raise ValueError("full attention takes no bias")
        table = (heads, *(2 * extent - 1 for extent in neighborhood.kernel))
        dtype = bias.dtype if bias.dtype == torch.float32 else query.dtype
        _require("bias", bias, table, dtype, query.device)
    for name, tensor in given.items():
        if name in _LIKE:
            like = getattr(operands, _LIKE[name])
            if like is None:
                raise ValueError(f"{name} must be absent where {_LIKE[name]} is")
            _require(name, tensor, like.shape, like.dtype, like.device)
    row_dtype = accumulation_dtype(query.dtype)
    if "grad_lse" in given:
        _require("grad_lse", operands.grad_lse, (batch, heads, *tokens), row_dtype, query.device)
    if "lse" in given:
        _require("lse", operands.lse, (2, batch, heads, *tokens), row_dtype, query.device)
        if not operands.lse.is_contiguous():
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
    axes, size = len(extents), len(code) - 1
    known = {FULL: size == 0, GRID: size == MAP_AXES, NEIGHBORHOOD: size == 4 * MAP_AXES * heads}
    if not code or not known.get(code[0], False) or code != (neighborhood := decode(code, axes)).encode():
        raise ValueError(
            f"neighborhood code {list(code)} must be [0], [1, three extents] or [2, twelve values per head]"
        )
    if isinstance(neighborhood, Grid) and grid_of(extents, neighborhood.window).cut(extents):
        raise ValueError(f"the window {neighborhood.window} must divide the map {extents}")
    if isinstance(neighborhood, Neighborhood):
        check_windows(neighborhood, extents)
    return neighborhood
