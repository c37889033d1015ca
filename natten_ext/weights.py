"""The attention weights of chosen queries: for looking at what a model attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .backends.reference import softmax, without_autocast
from .checks import (
    AXES,
    MAPS,
    SEQUENCE,
    FlagPerAxis,
    SizePerAxis,
    SizePerGroup,
    alike,
    check_bias,
    check_cross,
    check_dense,
    check_heads,
    check_map,
    check_score,
    grid_of,
    map_layout,
    neighborhood_of,
    scale_of,
    shape_of,
    shown,
)
from .composition import shareable
from .geometry import AnyNeighborhood, AxisKeys, Extents, Full, Grid, Neighborhood, axis_keys, indices
from .orders import accumulation_dtype


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor | Sequence[int] | Sequence[Extents],
    *,
    window_size: SizePerAxis | None = None,
    shift: SizePerAxis = 0,
    kernel_size: SizePerGroup | None = None,
    dilation: SizePerGroup = 1,
    stride: SizePerGroup = 1,
    is_causal: FlagPerAxis = False,
    bias: torch.Tensor | None = None,
    score: str = "dot",
    scale: float | None = None,
) -> torch.Tensor:
    """The exact softmax weights with which the queries at ``positions`` attend to every key.

    The neighborhood is the one of the function that takes the same arguments: ``grid_attention`` with ``window_size``
    (and ``shift``), ``neighborhood_attention`` with ``kernel_size`` (and ``dilation``, ``stride``, ``is_causal``),
    ``attention`` with neither.
    Only the scores of the chosen queries are computed, by plain PyTorch operations on any device, which can be
    differentiated to any order.

    Args:
        query, key: sequences ``(batch, tokens, heads, head_dim)`` or maps ``(batch, *map, heads, head_dim)`` of one to
            three axes, as in those functions; without a window or a kernel either will do (every query of a map
            attends every key of it).
        positions: the queries: int64 ``(P,)`` or a list of ints for sequences and maps of one axis, ``(P, axes)`` or a
            list of tuples such as (row, column) for other maps; the same for every image of the batch. Under
            ``torch.compile`` a list is a constant; a tensor breaks the graph, as its numbers say what is gathered.
        window_size, shift, kernel_size, dilation, stride, is_causal, bias, score, scale: as in those functions.

    Returns:
        ``(batch, P, heads, *map)``, for sequences ``(batch, P, heads, keys)``, zero outside the neighborhood; float64
        for float64 inputs, otherwise float32. Each ``[b, p, h]`` sums to 1.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message names it.
    """
    full = window_size is None and kernel_size is None
    layout = map_layout(query)
    if full and layout == MAPS[1]:
        layout = SEQUENCE
    query, key = alike(layout, query=query, key=key)
    check_heads(query)
    if layout == SEQUENCE:
        check_cross(query, key)
    else:
        check_map(query, key)
    check_score(score)
    scale = scale_of(query, scale)
    index = _checked_positions(positions, query.shape[1:-2])

    neighborhood: AnyNeighborhood = Full()
    if window_size is not None and kernel_size is not None:
        raise ValueError(
            f"window_size and kernel_size cannot both be given, got {shown(window_size)} and {shown(kernel_size)}"
        )
    extents, heads = query.shape[1:-2], query.shape[-2]
    for name, option, default in (("dilation", dilation, 1), ("stride", stride, 1), ("is_causal", is_causal, False)):
        if kernel_size is None and (type(option), option) != (type(default), default):
            raise ValueError(f"{name} needs a kernel_size, got {shown(option)}")
    if window_size is None and (type(shift), shift) != (int, 0):
        raise ValueError(f"shift needs a window_size, got {shown(shift)}")
    if window_size is not None:
        neighborhood = grid_of(extents, window_size, shift)
    elif kernel_size is not None:
        neighborhood = neighborhood_of(extents, heads, kernel_size, dilation, stride, is_causal)
    check_bias("bias", bias, query, neighborhood)
    key = shareable(key, heads, neighborhood)

    with without_autocast(query.device.type):
        return _weights(query, key, bias, index, neighborhood, score, scale)


def _checked_positions(positions: Any, extents: Sequence[int]) -> list[Extents]:
    """One tuple a position, in range."""
    wanted = (
        "(P,) for a sequence"
        if len(extents) == 1
        else f"(P, {len(extents)}), {', '.join(AXES[-len(extents) :])}, for a map"
    )
    if torch.compiler.is_compiling() and isinstance(positions, list | tuple):
        listed = list(positions)  # a tensor would hide the numbers
    else:
        listed = _integers(positions, wanted)
    index = [(position,) if isinstance(position, int) else tuple(position) for position in listed]
    if any(len(position) != len(extents) for position in index):
        raise ValueError(f"positions must have shape {wanted}, got {shown(positions)}")
    for axis, extent in enumerate(extents):
        for position in index:
            if not 0 <= position[axis] < extent:
                raise ValueError(f"positions must lie inside {tuple(extents)}, got {position[axis]} on axis {axis}")
    return index


def _integers(positions: Any, wanted: str) -> list:
    """Numbers, or lists of as many, found to be integers."""
    if isinstance(positions, torch.Tensor):
        check_dense("positions", positions)
        if positions.is_meta:
            raise ValueError("positions must have contents, got a meta tensor")
    try:
        index = torch.as_tensor(positions, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # no list or array; ragged; beyond int64
        kind = ValueError if isinstance(positions, list | tuple) else TypeError
        raise kind(f"positions must be 64-bit integers of shape {wanted}, got {shown(positions)}") from error
    if index.numel() == 0:
        raise ValueError(f"positions must hold at least one position, got {shown(positions)}")
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise TypeError(f"positions must be integers, got {index.dtype}")
    if index.dim() not in (1, 2):
        raise ValueError(f"positions must have shape {wanted}, got {shape_of(index)}")
    return index.to(torch.int64).tolist()


def _weights(query, key, bias, index, neighborhood, score, scale):
    dtype = accumulation_dtype(query.dtype)
    device, heads, extents = query.device, query.shape[-2], key.shape[1:-2]
    bias = None if bias is None else bias.to(dtype)  # before it is gathered: its gradient is a sum over many pairs
    at = (torch.tensor(of_axis, device=device) for of_axis in zip(*index, strict=True))
    chosen = query[(slice(None), *at)].to(dtype)  # (batch, P, heads, head_dim)
    shared = heads // key.shape[-2]
    tokens = key.flatten(1, -3)
    groups = neighborhood.head_groups() if isinstance(neighborhood, Neighborhood) else [(0, heads)]
    parts = []
    for first, last in groups:
        keys, offsets, exists = _keys(index, extents, neighborhood, first)
        keys = keys.to(device)
        group_query = chosen[:, :, first:last].unflatten(2, (-1, shared))
        # (batch, P, keys, key heads, head_dim)
        group_key = tokens[:, :, first // shared : last // shared][:, keys].to(dtype)
        if score == "dot":
            scores = torch.einsum("bphsd,bpkhd->bphsk", group_query, group_key) * scale
        else:
            distances = group_query.unsqueeze(4) - group_key.transpose(2, 3).unsqueeze(3)
            scores = distances.square().sum(-1) * -scale
        scores = scores.flatten(2, 3)
        if bias is not None:
            places = [o.to(device) + k - 1 for o, k in zip(offsets, neighborhood.kernel, strict=True)]
            scores = scores + bias[(slice(first, last), *places)].transpose(0, 1)
        scores = scores.masked_fill(~exists[:, None].to(device), -torch.inf)
        zeros = scores.new_zeros(*scores.shape[:-1], tokens.shape[1])
        # Missing keys have the place of one that is there, and a weight of zero.
        parts.append(zeros.scatter_add(-1, keys[:, None].expand(scores.shape), softmax(scores)))
    return torch.cat(parts, 2).unflatten(-1, extents)


def _keys(index, extents, neighborhood, head):
    """Of every chosen query its keys in row-major order, ``(P, keys)``, their offsets, one such tensor an axis, and
    which of them exist."""
    if isinstance(neighborhood, Full):
        keys = indices(extents.numel()).expand(len(index), -1)
        return keys, (), torch.ones_like(keys, dtype=torch.bool)
    axes = []
    for axis, length in enumerate(extents):
        of_axis = [position[axis] for position in index]
        if isinstance(neighborhood, Grid):
            queries = torch.tensor(of_axis, device="cpu")
            window, shift = neighborhood.window[axis], neighborhood.first[axis]
            keys = ((queries - shift) // window * window + shift)[:, None] + indices(window)
            exists = (keys >= 0) & (keys < length)
            keys = torch.where(exists, keys, queries[:, None])
            axes.append(AxisKeys(keys, keys - queries[:, None], exists))
        else:
            axes.append(axis_keys(of_axis, length, neighborhood.windows[head][axis]))
    dims = len(axes)

    def spread(numbers, axis):
        return numbers.reshape(len(index), *(-1 if other == axis else 1 for other in range(dims)))

    def on_map(field):
        numbers = torch.broadcast_tensors(*(spread(getattr(keys, field), axis) for axis, keys in enumerate(axes)))
        return [number.flatten(1) for number in numbers]

    keys = 0
    for of_axis, length in zip(on_map("index"), extents, strict=True):
        keys = keys * length + of_axis
    return keys, on_map("offset"), torch.stack(on_map("exists")).all(0)
