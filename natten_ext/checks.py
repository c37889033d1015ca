"""The rules that arguments of the public functions must keep; a message names the argument, its value and the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .geometry import AnyNeighborhood, Grid, IntPair, Neighborhood

SCORES = ("dot", "l2")
SizePerAxis = int | IntPair
"""Of both axes, or (height, width)."""
SizePerGroup = SizePerAxis | list[SizePerAxis]
"""Of all heads, or a list with one entry per equal group of heads: ``[7, 7]`` is two groups, ``(7, 7)`` two axes."""

SEQUENCE = "(batch, tokens, heads, head_dim)"
MAP = "(batch, height, width, heads, head_dim)"


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def shown(value: Any) -> str:
    """A value as messages show it: short, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # of an int with more than 4300 digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:120]}..."


# ---------------------------------------------------------------------------------------------- tensors


def check_dense(name: str, tensor: Any) -> None:
    """TypeError unless it is a tensor whose elements lie in memory by strides."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor (layout torch.strided), got {layout}")


def alike(layout: str, **tensors: Any) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's dtype where that is on, found to agree in device, dtype and number of dimensions."""
    dims = layout.count(",") + 1
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check_dense(name, tensor)
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions {layout}, got shape {shape_of(tensor)}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}")
    # Tables stay as they are: they are small, and may be float32 beside half-precision maps.
    cast = tuple(_autocast(tensor) for tensor in tensors.values())
    for name, tensor in zip(tensors, cast, strict=True):
        if tensor.dtype != cast[0].dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {cast[0].dtype}, got {tensor.dtype}")
    return cast


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """In autocast's dtype where that is on; float64 stays, as in torch."""
    device_type = tensor.device.type
    # Not torch.amp.is_autocast_available: torch 2.11 can't compile it.
    if device_type == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def check_heads(query: torch.Tensor) -> None:
    for position, name in ((-2, "heads"), (-1, "head_dim")):
        if query.shape[position] == 0:
            raise ValueError(f"query must have {name} of at least 1, got shape {shape_of(query)}")


def checked_sequences(query: Any, key: Any, value: Any) -> tuple[torch.Tensor, ...]:
    """Operands of full attention."""
    query, key, value = alike(SEQUENCE, query=query, key=key, value=value)
    check_heads(query)
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape, got {shape_of(key)} and {shape_of(value)}")
    check_cross(query, key)
    return query, key, value


def check_cross(query: torch.Tensor, key: torch.Tensor) -> None:
    if (query.shape[0], *query.shape[-2:]) != (key.shape[0], *key.shape[-2:]):
        raise ValueError(
            "query and key must agree in batch, heads and head_dim"
            f" {MAP if query.dim() == 5 else SEQUENCE}, got {shape_of(query)} and {shape_of(key)}"
        )
    if 0 in key.shape[1:-2]:
        raise ValueError(f"key must hold at least one token, got shape {shape_of(key)}")


def checked_maps(query: Any, key: Any, value: Any) -> tuple[torch.Tensor, ...]:
    """Operands of attention on maps, which have one shape."""
    query, key, value = alike(MAP, query=query, key=key, value=value)
    check_heads(query)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(f"{name} must have the query's shape {shape_of(query)}, got {shape_of(tensor)}")
    if 0 in query.shape[1:3]:
        raise ValueError(f"query must have a height and width of at least 1, got shape {shape_of(query)}")
    return query, key, value


def check_table(name: str, table: Any, query: torch.Tensor, heads: int, kernel: IntPair) -> None:
    """Of relative positions, for a query of so many heads."""
    check_dense(name, table)
    expected = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    if shape_of(table) != expected:
        raise ValueError(
            f"{name} must have shape (heads, 2 * rows - 1, 2 * columns - 1) = {expected}, got {shape_of(table)}"
        )
    if table.dtype not in (query.dtype, torch.float32):
        raise TypeError(f"{name} must have the query's dtype {query.dtype} or float32, got {table.dtype}")
    if table.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, got {table.device}")


def check_bias(name: str, bias: Any, query: torch.Tensor, neighborhood: AnyNeighborhood) -> None:
    """A table, or None; full attention has none."""
    if bias is None:
        return
    if not isinstance(neighborhood, Grid | Neighborhood):
        raise ValueError(f"{name} needs a window_size or a kernel_size: full attention has no table")
    check_table(name, bias, query, query.shape[-2], neighborhood.kernel)


# ---------------------------------------------------------------------------------------------- score


def check_score(score: Any) -> None:
    if not isinstance(score, str) or score not in SCORES:
        raise ValueError(f"score must be one of {SCORES}, got {shown(score)}")


def check_scale(scale: Any, dtype: torch.dtype) -> None:
    """None or a factor that fits the precision of the scores of tensors of ``dtype``, with room for two more."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None, got {shown(scale)} of type {type(scale).__name__}")
    largest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max / 4
    if not 0 < scale <= largest:  # nor NaN
        raise ValueError(f"scale must be positive and at most {largest:.3g} for {dtype}, got {shown(scale)}")


def scale_of(query: torch.Tensor, scale: Any) -> float:
    """The scale to use."""
    check_scale(scale, query.dtype)
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {shown(value)}")


# ---------------------------------------------------------------------------------------------- neighborhoods


def grid_of(extents: Sequence[int], window_size: Any) -> Grid:
    """The windows on a map of these extents."""
    window = pair("window_size", window_size)
    for axis, size, extent in zip(("height", "width"), extents, window, strict=True):
        if size % extent:
            raise ValueError(f"window_size must divide the map: {axis} {size} is not a multiple of {shown(extent)}")
    return Grid(window)


def neighborhood_of(extents: Sequence[int], heads: int, kernel_size: Any, dilation: Any) -> Neighborhood:
    """The neighborhoods of so many heads on a map of these extents."""
    kernels = per_head("kernel_size", kernel_size, heads)
    dilations = per_head("dilation", dilation, heads)
    for kernel, step in dict.fromkeys(zip(kernels, dilations, strict=True)):
        check_reach(extents, kernel, step)
    return Neighborhood(kernels, dilations)


def check_reach(extents: Sequence[int], kernel: IntPair, dilation: IntPair) -> None:
    for axis, size, k, d in zip(("height", "width"), extents, kernel, dilation, strict=True):
        if k * d > size:
            raise ValueError(f"kernel_size * dilation must not exceed the map: {shown(k)} * {shown(d)} > {axis} {size}")


def pair(name: str, size: Any) -> IntPair:
    """(height, width) from an int or a tuple."""
    extents = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(extents, tuple)
        or len(extents) != 2
        or not all(isinstance(extent, int) and not isinstance(extent, bool) for extent in extents)
    ):
        raise TypeError(f"{name} must be an int or a tuple (height, width) of ints, got {shown(size)}")
    if min(extents) < 1:
        raise ValueError(f"{name} must be at least 1 on each axis, got {shown(size)}")
    return extents


def per_head(name: str, size: Any, heads: int) -> tuple[IntPair, ...]:
    """One pair per head from an int, a pair, or a list with one entry per equal group of heads."""
    groups: Sequence[Any] = size if isinstance(size, list) else [size]
    if not groups or heads % len(groups):
        raise ValueError(
            f"{name} as a list has one entry per group of heads, so its length must divide the {heads} heads"
            f" (height and width are a tuple), got {len(groups)} entries"
        )
    pairs = [pair(f"{name} entry" if isinstance(size, list) else name, entry) for entry in groups]
    return tuple(extents for extents in pairs for _ in range(heads // len(groups)))
