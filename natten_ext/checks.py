"""The rules that arguments of the public functions must keep; a message names the argument, its value and the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .geometry import MAP_AXES, AnyNeighborhood, AxisWindow, Extents, Grid, Neighborhood
from .orders import accumulation_dtype
from .remembered import of_plain_values

SCORES = ("dot", "l2")
SizePerAxis = int | Extents
"""Of all map axes, or a tuple with one number per axis, such as (height, width)."""
SizePerGroup = SizePerAxis | list[SizePerAxis]
"""Of all heads, or a list with one entry per equal group of heads: ``[7, 7]`` is two groups, ``(7, 7)`` two axes."""
FlagPerAxis = bool | tuple[bool, ...]

AXES = ("depth", "height", "width")
"""Of maps; one of fewer axes has the last ones."""
SEQUENCE = "(batch, tokens, heads, head_dim)"


def layout_of_map(axes: int, before: str, after: str) -> str:
    """The dimensions of a tensor with so many map axes, as messages write them."""
    return f"({before}, {', '.join(AXES[-axes:])}, {after})"


MAPS = {axes: layout_of_map(axes, "batch", "heads, head_dim") for axes in range(1, MAP_AXES + 1)}
"""By number of map axes."""


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
    cast = tuple(tensors.values())
    # The first question is asked in half the time of the second.
    if torch._C._is_any_autocast_enabled() and _autocasts(first.device.type):
        cast = tuple(_autocast(tensor) for tensor in cast)
    dtype = cast[0].dtype
    for name, tensor in zip(tensors, cast, strict=True):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {dtype}, got {tensor.dtype}")
    return cast


def _autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """In autocast's dtype; float64 stays, as in torch."""
    # Not torch.amp.is_autocast_available: torch 2.11 can't compile it.
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(tensor.device.type))


def check_heads(query: torch.Tensor) -> None:
    shape = query.shape
    for position, name in ((-2, "heads"), (-1, "head_dim")):
        if shape[position] == 0:
            raise ValueError(f"query must have {name} of at least 1, got shape {shape_of(query)}")


def checked_sequences(query: Any, key: Any, value: Any) -> tuple[torch.Tensor, ...]:
    """Operands of full attention."""
    query, key, value = alike(SEQUENCE, query=query, key=key, value=value)
    if not _usual(query, key, value):
        check_heads(query)
        check_cross(query, key)
        check_values("value", value, "key", key)
    return query, key, value


def _usual(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether shapes are equal, and nothing empty but the batch: then they break no rule."""
    shape = query.shape
    return shape == key.shape == value.shape and 0 not in shape[1:]


def check_cross(query: torch.Tensor, key: torch.Tensor, name: str = "key") -> None:
    """Of keys that queries attend: their heads may be fewer, each shared by as many query heads."""
    layout = SEQUENCE if key.dim() == 4 else map_layout(key)
    if (query.shape[0], query.shape[-1]) != (key.shape[0], key.shape[-1]):
        raise ValueError(
            f"query and {name} must agree in batch and head_dim {layout}, got {shape_of(query)} and {shape_of(key)}"
        )
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{name} must have heads that divide the query's {query.shape[-2]} {layout}, got {shape_of(key)}"
        )
    if 0 in key.shape[1:-2]:
        raise ValueError(f"{name} must hold at least one token, got shape {shape_of(key)}")


def check_values(name: str, value: torch.Tensor, key_name: str, key: torch.Tensor) -> None:
    """Of values of those keys: their vectors may have another width."""
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of {key_name} but for head_dim, got {shape_of(value)} and {shape_of(key)}"
        )
    if value.shape[-1] == 0:
        raise ValueError(f"{name} must have head_dim of at least 1, got shape {shape_of(value)}")


def map_layout(query: Any) -> str:
    """The layout of a map of as many axes as the query has."""
    check_dense("query", query)
    if query.dim() - 3 not in MAPS:
        raise ValueError(
            f"query must have 4 to {3 + MAP_AXES} dimensions (batch, *map, heads, head_dim), with a map of one to"
            f" {MAP_AXES} axes, got shape {shape_of(query)}"
        )
    return MAPS[query.dim() - 3]


def checked_maps(query: Any, key: Any, value: Any) -> tuple[torch.Tensor, ...]:
    """Operands of attention on maps of one to three axes, which have one map."""
    query, key, value = alike(map_layout(query), query=query, key=key, value=value)
    if not _usual(query, key, value):
        check_heads(query)
        check_map(query, key)
        check_values("value", value, "key", key)
    return query, key, value


def check_map(query: torch.Tensor, key: torch.Tensor) -> None:
    """Of keys on the map of the queries."""
    check_extents(query)
    if key.shape == query.shape:
        return
    if key.shape[1:-2] != query.shape[1:-2]:
        raise ValueError(f"key must have the query's map {shape_of(query)}, got {shape_of(key)}")
    check_cross(query, key)


def checked_additional(query: torch.Tensor, keys: Any, values: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Keys and values that every query of a map attends besides, or None for both."""
    names = "additional_keys", "additional_values"
    if keys is None and values is None:
        return None, None
    for name, other, tensor in zip(names, reversed(names), (keys, values), strict=True):
        if tensor is None:
            raise ValueError(f"{name} must be given where {other} is, got None")
    layout = "(batch, additional tokens, heads, head_dim)"
    keys, values = alike(layout, **dict(zip(names, (keys, values), strict=True)))
    if keys.dtype != query.dtype:
        raise TypeError(f"additional_keys must have the query's dtype {query.dtype}, got {keys.dtype}")
    if keys.device != query.device:
        raise ValueError(f"additional_keys must be on the query's device {query.device}, got {keys.device}")
    check_cross(query, keys, "additional_keys")
    check_values("additional_values", values, "additional_keys", keys)
    return keys, values


def check_extents(query: torch.Tensor) -> None:
    """Of the map that the query is."""
    if 0 in query.shape[1:-2]:
        axes = ", ".join(AXES[3 - query.dim() :])
        raise ValueError(f"query must have a {axes} of at least 1, got shape {shape_of(query)}")


def check_table(name: str, table: Any, query: torch.Tensor, heads: int, kernel: Extents) -> None:
    """Of relative positions, for a query of so many heads."""
    check_dense(name, table)
    expected = (heads, *(2 * extent - 1 for extent in kernel))
    if shape_of(table) != expected:
        rule = ", ".join(f"2 * kernel {axis} - 1" for axis in AXES[-len(kernel) :])
        raise ValueError(f"{name} must have shape (heads, {rule}) = {expected}, got {shape_of(table)}")
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
    largest = torch.finfo(accumulation_dtype(dtype)).max / 4
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


def grid_of(extents: Sequence[int], window_size: Any, shift: Any = 0) -> Grid:
    """The windows on a map of these extents."""
    return _grid_of(tuple(extents), window_size, shift)


@of_plain_values
def _grid_of(extents: Extents, window_size: Any, shift: Any) -> Grid:
    grid = windows_of_grid(len(extents), window_size, shift)
    for axis, size, extent in zip(AXES[-len(extents) :], extents, grid.window, strict=True):
        if extent > size:
            raise ValueError(f"window_size must not exceed the map: {shown(extent)} > {axis} {size}")
    return grid


def windows_of_grid(axes: int, window_size: Any, shift: Any = 0) -> Grid:
    """The windows on any map of so many axes that is large enough."""
    window, shift = extents_of("window_size", window_size, axes), extents_of("shift", shift, axes, least=0)
    for extent, start in zip(window, shift, strict=True):
        if start >= extent:
            raise ValueError(f"shift must be less than window_size: {shown(start)} >= {shown(extent)}")
    return Grid(window, shift)


def neighborhood_of(
    extents: Sequence[int], heads: int, kernel_size: Any, dilation: Any, stride: Any = 1, is_causal: Any = False
) -> Neighborhood:
    """The neighborhoods of so many heads on a map of these extents."""
    return _neighborhood_of(tuple(extents), heads, kernel_size, dilation, stride, is_causal)


@of_plain_values
def _neighborhood_of(
    extents: Extents, heads: int, kernel_size: Any, dilation: Any, stride: Any, is_causal: Any
) -> Neighborhood:
    neighborhood = windows_of(len(extents), heads, kernel_size, dilation, stride, is_causal)
    check_windows(neighborhood, extents)
    return neighborhood


def check_windows(neighborhood: Neighborhood, extents: Sequence[int]) -> None:
    """Of a neighborhood on a map of these extents."""
    for windows in dict.fromkeys(neighborhood.windows):  # in this order, for the message
        for axis, size, (kernel, dilation, stride, _) in zip(AXES[-len(extents) :], extents, windows, strict=True):
            if min(kernel, dilation, stride) < 1:
                raise ValueError(
                    f"kernel_size, dilation and stride must be at least 1, got {kernel}, {dilation}, {stride}"
                )
            if kernel * dilation > size:
                raise ValueError(
                    "kernel_size * dilation must not exceed the map:"
                    f" {shown(kernel)} * {shown(dilation)} > {axis} {size}"
                )
            check_stride(stride, kernel)


def check_stride(stride: int, kernel: int) -> None:
    if stride > kernel:
        raise ValueError(f"stride must not exceed kernel_size: {shown(stride)} > {shown(kernel)}")


def windows_of(
    axes: int, heads: int, kernel_size: Any, dilation: Any, stride: Any = 1, is_causal: Any = False
) -> Neighborhood:
    """The neighborhoods of so many heads on any map of so many axes that is large enough."""
    sizes = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride}
    per_axis = [per_head(name, size, heads, axes) for name, size in sizes.items()]
    causal = flags_of("is_causal", is_causal, axes)
    of_heads = list(zip(*per_axis, strict=True))
    windows = {}
    for sizes in set(of_heads):
        windows[sizes] = tuple(AxisWindow(*numbers) for numbers in zip(*sizes, causal, strict=True))
        for window in windows[sizes]:
            check_stride(window.stride, window.kernel)
    return Neighborhood(tuple(windows[sizes] for sizes in of_heads))


def extents_of(name: str, size: Any, axes: int, least: int = 1) -> Extents:
    """One number per map axis, from an int or a tuple."""
    extents = _on_each_axis(name, size, axes, int, "an int")
    if min(extents) < least:
        raise ValueError(f"{name} must be at least {least} on each axis, got {shown(size)}")
    return extents


def flags_of(name: str, flag: Any, axes: int) -> tuple[bool, ...]:
    """One bool per map axis, from a bool or a tuple."""
    return _on_each_axis(name, flag, axes, bool, "a bool")


def _on_each_axis(name: str, value: Any, axes: int, kind: type, one: str) -> tuple:
    """One of a kind (int, which a bool is not, or bool) per map axis, from one for all or a tuple."""
    values = (value,) * axes if isinstance(value, kind) else value
    if (
        not isinstance(values, tuple)
        or len(values) != axes
        or not all(isinstance(v, kind) and isinstance(v, bool) == (kind is bool) for v in values)
    ):
        layout = ", ".join(AXES[-axes:]) + ("," if axes == 1 else "")
        raise TypeError(f"{name} must be {one} or a tuple ({layout}) of {kind.__name__}s, got {shown(value)}")
    return values


def per_head(name: str, size: Any, heads: int, axes: int) -> tuple[Extents, ...]:
    """Extents of every head, from those of all or a list with one entry per equal group of heads."""
    groups: Sequence[Any] = size if isinstance(size, list) else [size]
    if not groups or heads % len(groups):
        raise ValueError(
            f"{name} as a list has one entry per group of heads, so its length must divide the {heads} heads"
            f" (map axes are a tuple), got {len(groups)} entries"
        )
    entries = [extents_of(f"{name} entry" if isinstance(size, list) else name, entry, axes) for entry in groups]
    return tuple(extents for extents in entries for _ in range(heads // len(groups)))
