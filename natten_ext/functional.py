"""The public functions: checks, the choice of a backend, and the call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from . import dispatch, reference
from .geometry import AnyNeighborhood, Full, Grid, IntPair, Neighborhood
from .recording import record

SCORES = ("dot", "l2")
SizePerAxis = int | IntPair


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    score: str = "dot",
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of every query to every key, with three derivative orders and memory linear in the tokens.

    ``softmax_j(scale * score(q_i, k_j)) v_j`` with ``score`` "dot" (q.k; Vaswani et al., arXiv 1706.03762) or "l2"
    (-|q-k|^2; Kim et al., arXiv 2006.04710).

    Args:
        query: ``(batch, queries, heads, head_dim)``; float32, float64, bfloat16 or float16, any strides.
        key, value: ``(batch, keys, heads, head_dim)``, the same dtype and device; at least one key.
        score: "dot" or "l2".
        scale: positive factor of the score; ``head_dim ** -0.5`` if None.
        backend: a name from ``natten_ext.backends()``; None lets ``use_backend`` or the package choose.

    Returns:
        ``(batch, queries, heads, head_dim)``.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message names it.
        RuntimeError: the backend asked for can't run this, or a third derivative of a fused backend is asked for.
    """
    query, key, value = _checked(query, key, value, dims=4)
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape, got {_shape(key)} and {_shape(value)}")
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(
            "query and key must agree in batch, heads and head_dim"
            f" (batch, tokens, heads, head_dim), got {_shape(query)} and {_shape(key)}"
        )
    if key.shape[1] == 0:
        raise ValueError("key must hold at least one token, got 0")
    return _run(query, key, value, None, Full(), score, scale, backend)


def l2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``attention`` with the score -|q-k|^2. A layer is Lipschitz with it if query and key are one projection (tied),
    which its values pass through as well.

    Kim et al., "The Lipschitz Constant of Self-Attention", arXiv 2006.04710, section 3.2; ViTGAN's discriminator
    (Lee et al., arXiv 2107.04589). Arguments and errors as ``attention``.
    """
    return attention(query, key, value, score="l2", scale=scale, backend=backend)


def grid_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_size: SizePerAxis,
    *,
    bias: torch.Tensor | None = None,
    score: str = "dot",
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention inside non-overlapping windows of a map (TransGAN's grid self-attention, arXiv 2102.07074).

    With the window equal to the map it is full attention with a relative position bias.

    Args:
        query, key, value: ``(batch, height, width, heads, head_dim)``; dtypes and strides as ``attention``.
        window_size: int or (height, width); must divide the map.
        bias: relative position table ``(heads, 2 * window_height - 1, 2 * window_width - 1)``, added to the scaled
            score and indexed by key minus query plus ``window - 1``; the query's dtype or float32.
        score, scale, backend: as ``attention``.

    Returns:
        ``(batch, height, width, heads, head_dim)``.

    Raises:
        As ``attention``.
    """
    query, key, value = _checked_maps(query, key, value)
    return _run(query, key, value, bias, _grid(query, window_size), score, scale, backend)


def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: SizePerAxis | list[SizePerAxis],
    dilation: SizePerAxis | list[SizePerAxis] = 1,
    *,
    bias: torch.Tensor | None = None,
    score: str = "dot",
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Sliding-window attention on a map, dilated, with its own kernel and dilation per group of heads.

    NATTEN's neighborhoods (arXiv 2204.07143, 2209.15001): exactly ``kernel_size`` keys per axis, ``dilation`` apart,
    centred on the query and shifted inward at the borders. Lists make StyleNAT's Hydra-NA (arXiv 2211.05770) one
    launch.

    Args:
        query, key, value: ``(batch, height, width, heads, head_dim)``; dtypes and strides as ``attention``.
        kernel_size: int, (height, width), or a list of these with one entry per equal group of heads.
        dilation: likewise. ``kernel_size * dilation`` must not exceed the map.
        bias: relative position table ``(heads, 2 * Kh - 1, 2 * Kw - 1)`` with K the largest kernel over the heads,
            indexed by (key minus query) / dilation plus ``K - 1``; the query's dtype or float32.
        score, scale, backend: as ``attention``.

    Returns:
        ``(batch, height, width, heads, head_dim)``.

    Raises:
        As ``attention``.
    """
    query, key, value = _checked_maps(query, key, value)
    return _run(query, key, value, bias, _neighborhood(query, kernel_size, dilation), score, scale, backend)


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    neighborhood: AnyNeighborhood,
    score: str,
    scale: float | None,
    backend: str | None,
) -> torch.Tensor:
    scale = _checked_score(query, score, scale)
    device_type = query.device.type
    if bias is not None:
        _check_bias(bias, query, neighborhood)
    name = dispatch.choose(backend, device_type, query.dtype, query.shape[-1], neighborhood.kind)
    record(name, query, key, bias, neighborhood, score, scale)
    if name == "reference":
        return reference.attention(query, key, value, bias, neighborhood, score, scale)
    output, _ = torch.ops.natten_ext.attention(query, key, value, bias, neighborhood.encode(), score, scale, name)
    return output


# ---------------------------------------------------------------------------------------------- checks


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _checked(query: Any, key: Any, value: Any, dims: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value in autocast's dtype where that is on, found to be alike."""
    tensors = {"query": query, "key": key, "value": value}
    layout = {4: "(batch, tokens, heads, head_dim)", 5: "(batch, height, width, heads, head_dim)"}[dims]
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions {layout}, got shape {_shape(tensor)}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}, got {tensor.device}")
    for position, name in ((dims - 2, "heads"), (dims - 1, "head_dim")):
        if query.shape[position] == 0:
            raise ValueError(f"query must have {name} of at least 1, got shape {_shape(query)}")
    tensors = _autocast(tensors)  # the table stays as it is: it may be float32 beside half-precision maps, and is small
    for name, tensor in tensors.items():
        if tensor.dtype != tensors["query"].dtype:
            raise TypeError(f"{name} must have the query's dtype {tensors['query'].dtype}, got {tensor.dtype}")
    return tensors["query"], tensors["key"], tensors["value"]


def _autocast(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of one device, in autocast's dtype where that is on; float64 stays, as in torch."""
    device_type = next(iter(tensors.values())).device.type
    # Not torch.amp.is_autocast_available: torch 2.11 can't compile it.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return {name: x if x.dtype == torch.float64 else x.to(dtype) for name, x in tensors.items()}


def _checked_maps(query: Any, key: Any, value: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = _checked(query, key, value, dims=5)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(f"{name} must have the query's shape {_shape(query)}, got {_shape(tensor)}")
    if 0 in query.shape[1:3]:
        raise ValueError(f"query must have a height and width of at least 1, got shape {_shape(query)}")
    return query, key, value


def _checked_score(query: torch.Tensor, score: Any, scale: Any) -> float:
    """The scale to use, where score and scale are what they may be."""
    if score not in SCORES:
        raise ValueError(f"score must be one of {SCORES}, got {score!r}")
    if scale is None:
        return query.shape[-1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None, got {scale!r} of type {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return float(scale)


def _grid(query: torch.Tensor, window_size: Any) -> Grid:
    window = _pair("window_size", window_size)
    for axis, size, extent in zip(("height", "width"), query.shape[1:3], window, strict=True):
        if size % extent:
            raise ValueError(f"window_size must divide the map: {axis} {size} is not a multiple of {extent}")
    return Grid(window)


def _neighborhood(query: torch.Tensor, kernel_size: Any, dilation: Any) -> Neighborhood:
    heads = query.shape[3]
    kernels = _per_head("kernel_size", kernel_size, heads)
    dilations = _per_head("dilation", dilation, heads)
    for kernel, step in dict.fromkeys(zip(kernels, dilations, strict=True)):
        for axis, size, k, d in zip(("height", "width"), query.shape[1:3], kernel, step, strict=True):
            if k * d > size:
                raise ValueError(f"kernel_size * dilation must not exceed the map: {k} * {d} > {axis} {size}")
    return Neighborhood(kernels, dilations)


def _check_bias(bias: Any, query: torch.Tensor, neighborhood: AnyNeighborhood) -> None:
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
    rows, columns = neighborhood.kernel
    expected = (query.shape[-2], 2 * rows - 1, 2 * columns - 1)
    if _shape(bias) != expected:
        raise ValueError(
            f"bias must have shape (heads, 2 * rows - 1, 2 * columns - 1) = {expected}, got {_shape(bias)}"
        )
    if bias.dtype not in (query.dtype, torch.float32):
        raise TypeError(f"bias must have the query's dtype {query.dtype} or float32, got {bias.dtype}")
    if bias.device != query.device:
        raise ValueError(f"bias must be on the query's device {query.device}, got {bias.device}")


def _pair(name: str, size: Any) -> IntPair:
    pair = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(pair, tuple)
        or len(pair) != 2
        or not all(isinstance(extent, int) and not isinstance(extent, bool) for extent in pair)
    ):
        raise TypeError(f"{name} must be an int or a tuple (height, width) of ints, got {size!r}")
    if min(pair) < 1:
        raise ValueError(f"{name} must be at least 1 on each axis, got {size!r}")
    return pair


def _per_head(name: str, size: Any, heads: int) -> tuple[IntPair, ...]:
    """One pair per head from an int, a pair, or a list with one entry per equal group of heads."""
    groups: Sequence[Any] = size if isinstance(size, list) else [size]
    if not groups or heads % len(groups):
        raise ValueError(f"{name} must be a list whose length divides the {heads} heads, got {len(groups)} entries")
    pairs = [_pair(f"{name} entry" if isinstance(size, list) else name, entry) for entry in groups]
    return tuple(pair for pair in pairs for _ in range(heads // len(groups)))
