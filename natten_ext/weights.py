"""The attention weights of chosen queries: for looking at what a model attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .backends.reference import softmax, without_autocast
from .checks import (
    MAP,
    SEQUENCE,
    SizePerAxis,
    SizePerGroup,
    alike,
    check_bias,
    check_cross,
    check_dense,
    check_heads,
    check_score,
    grid_of,
    neighborhood_of,
    scale_of,
    shape_of,
    shown,
)
from .geometry import AnyNeighborhood, Full, Grid, Neighborhood, indices, window_starts


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor | Sequence[int] | Sequence[tuple[int, int]],
    *,
    window_size: SizePerAxis | None = None,
    kernel_size: SizePerGroup | None = None,
    dilation: SizePerGroup = 1,
    bias: torch.Tensor | None = None,
    score: str = "dot",
    scale: float | None = None,
) -> torch.Tensor:
    """The exact softmax weights with which the queries at ``positions`` attend to every key.

    The neighborhood is the one of the function that takes the same arguments: ``grid_attention`` with
    ``window_size``, ``neighborhood_attention`` with ``kernel_size`` (and ``dilation``), ``attention`` with neither.
    Only the scores of the chosen queries are computed, by plain PyTorch operations on any device, which can be
    differentiated to any order.

    Args:
        query, key: sequences ``(batch, tokens, heads, head_dim)`` or maps ``(batch, height, width, heads, head_dim)``,
            as in those functions; without a window or a kernel either will do (every query of a map attends every
            key of it).
        positions: the queries: int64 ``(P,)`` or a list of ints for sequences, ``(P, 2)`` or a list of (row, column)
            for maps; the same for every image of the batch.
        window_size, kernel_size, dilation, bias, score, scale: as in those functions.

    Returns:
        ``(batch, P, heads, keys)`` for sequences and ``(batch, P, heads, height, width)`` for maps, zero outside the
        neighborhood; float64 for float64 inputs, otherwise float32. Each ``[b, p, h]`` sums to 1.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message names it.
    """
    dims = query.dim() if isinstance(query, torch.Tensor) and query.dim() in (4, 5) else 4
    if window_size is not None or kernel_size is not None:
        dims = 5
    query, key = alike(SEQUENCE if dims == 4 else MAP, query=query, key=key)
    check_heads(query)
    check_cross(query, key)
    if dims == 5 and query.shape != key.shape:
        raise ValueError(f"key must have the query's shape {shape_of(query)}, got {shape_of(key)}")
    check_score(score)
    scale = scale_of(query, scale)
    index = _checked_positions(positions, query)

    neighborhood: AnyNeighborhood = Full()
    if window_size is not None and kernel_size is not None:
        raise ValueError(
            f"window_size and kernel_size cannot both be given, got {shown(window_size)} and {shown(kernel_size)}"
        )
    if kernel_size is None and not (isinstance(dilation, int) and dilation == 1):
        raise ValueError(f"dilation needs a kernel_size, got {shown(dilation)}")
    if window_size is not None:
        neighborhood = grid_of(query.shape[1:3], window_size)
    elif kernel_size is not None:
        neighborhood = neighborhood_of(query.shape[1:3], query.shape[3], kernel_size, dilation)
    check_bias("bias", bias, query, neighborhood)

    with without_autocast(query.device.type):
        return _weights(query, key, bias, index, neighborhood, score, scale)


def _checked_positions(positions: Any, query: torch.Tensor) -> torch.Tensor:
    """Int64 ``(P, axes)`` on the CPU, in range."""
    if isinstance(positions, torch.Tensor):
        check_dense("positions", positions)
        if positions.is_meta:
            raise ValueError("positions must have contents, got a meta tensor")
    extents = query.shape[1:-2]
    wanted = "(P,) for a sequence" if len(extents) == 1 else "(P, 2), rows and columns, for a map"
    try:
        index = torch.as_tensor(positions, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # no list or array; ragged; beyond int64
        kind = ValueError if isinstance(positions, list | tuple) else TypeError
        raise kind(f"positions must be 64-bit integers of shape {wanted}, got {shown(positions)}") from error
    if index.numel() == 0:
        raise ValueError(f"positions must hold at least one position, got {shown(positions)}")
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise TypeError(f"positions must be integers, got {index.dtype}")
    index = index.to(torch.int64)
    if len(extents) == 1 and index.dim() == 1:
        index = index[:, None]
    if index.dim() != 2 or index.shape[1] != len(extents):
        raise ValueError(f"positions must have shape {wanted}, got {shape_of(index)}")
    for axis, extent in enumerate(extents):
        low, high = int(index[:, axis].min()), int(index[:, axis].max())
        if low < 0 or high >= extent:
            raise ValueError(
                f"positions must lie inside {tuple(extents)}, got {low if low < 0 else high} on axis {axis}"
            )
    return index


def _weights(query, key, bias, index, neighborhood, score, scale):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    device, heads, extents = query.device, query.shape[-2], key.shape[1:-2]
    bias = None if bias is None else bias.to(dtype)  # before it is gathered: its gradient is a sum over many pairs
    chosen = query[(slice(None), *index.to(device).unbind(1))].to(dtype)  # (batch, P, heads, head_dim)
    tokens = key.flatten(1, -3)
    groups = neighborhood.head_groups() if isinstance(neighborhood, Neighborhood) else [(0, heads)]
    parts = []
    for first, last in groups:
        keys, offsets = _keys(index, extents, neighborhood, first)
        keys = keys.to(device)
        group_query = chosen[:, :, first:last]
        group_key = tokens[:, :, first:last][:, keys].to(dtype)  # (batch, P, keys, heads, head_dim)
        if score == "dot":
            scores = torch.einsum("bphd,bpkhd->bphk", group_query, group_key) * scale
        else:
            scores = (group_query.unsqueeze(2) - group_key).square().sum(-1).transpose(2, 3) * -scale
        if bias is not None:
            rows, columns = (o.to(device) + k - 1 for o, k in zip(offsets, neighborhood.kernel, strict=True))
            scores = scores + bias[first:last, rows, columns].transpose(0, 1)
        zeros = scores.new_zeros(*scores.shape[:-1], tokens.shape[1])
        parts.append(zeros.scatter(-1, keys[:, None].expand(scores.shape), softmax(scores)))
    return torch.cat(parts, 2).unflatten(-1, extents)


def _keys(index, extents, neighborhood, head):
    """Of every chosen query its keys in row-major order, ``(P, keys)``, and their offsets, one such tensor an axis."""
    if isinstance(neighborhood, Full):
        return indices(extents.numel()).expand(len(index), -1), ()
    keys_of_axis, offsets_of_axis = [], []
    for axis, length in enumerate(extents):
        queries = index[:, axis]
        if isinstance(neighborhood, Grid):
            count, step = neighborhood.window[axis], 1
            start = queries // count * count
        else:
            count, step = neighborhood.kernels[head][axis], neighborhood.dilations[head][axis]
            start = window_starts(queries.tolist(), length, count, step)
        keys_of_axis.append(start[:, None] + step * indices(count))
        offsets_of_axis.append((keys_of_axis[-1] - queries[:, None]) // step)
    keys = (keys_of_axis[0][:, :, None] * extents[1] + keys_of_axis[1][:, None, :]).flatten(1)
    rows, columns = torch.broadcast_tensors(offsets_of_axis[0][:, :, None], offsets_of_axis[1][:, None, :])
    return keys, (rows.flatten(1), columns.flatten(1))
