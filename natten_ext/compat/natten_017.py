"""The names of NATTEN 0.17 and before: unfused scores and sums, as three bilinear maps; see ``natten_ext.compat``."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import SizePerAxis, alike, check_table, neighborhood_of, shape_of
from ..geometry import AxisWindow, Extents, axis_keys
from .natten_021 import fused, pair_of, refuse, refuse_causal

Causal = bool | tuple[bool, bool] | None

MAPS = "(batch, heads, height, width, channels)"


def na2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: SizePerAxis,
    dilation: SizePerAxis = 1,
    is_causal: Causal = False,
    rpb: torch.Tensor | None = None,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    xformers_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Fused neighborhood attention with the arguments in the order of NATTEN 0.17; see ``natten_ext.na2d``.

    Maps are ``(batch, height, width, heads, head_dim)``, unlike those of ``na2d_qk``.
    """
    refuse_causal(is_causal)
    refuse("additional_keys", additional_keys, "additional keys", allowed=additional_keys is None)
    refuse("additional_values", additional_values, "additional values", allowed=additional_values is None)
    refuse("xformers_kwargs", xformers_kwargs, "options of xFormers", allowed=xformers_kwargs is None)
    return fused(query, key, value, kernel_size, dilation, rpb, scale)


def na2d_qk(
    query: torch.Tensor,
    key: torch.Tensor,
    kernel_size: SizePerAxis,
    dilation: SizePerAxis = 1,
    additional_keys: torch.Tensor | None = None,
    is_causal: Causal = False,
    rpb: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of every query with the keys of its neighborhood: ``q_i . k_j + rpb``, not scaled (scale the query).

    Args:
        query, key: ``(batch, heads, height, width, head_dim)``, one shape and floating dtype.
        kernel_size, dilation: int or (height, width); ``kernel_size * dilation`` must not exceed the map.
        rpb: relative position table ``(heads, 2 * kernel_height - 1, 2 * kernel_width - 1)``, indexed by
            (key minus query) / dilation plus ``kernel - 1``.

    Returns:
        ``(batch, heads, height, width, kernel_height * kernel_width)``, keys in row-major order, the query's dtype.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. NotImplementedError: additional keys, causal masks.
    """
    refuse_causal(is_causal)
    refuse("additional_keys", additional_keys, "additional keys", allowed=additional_keys is None)
    query, key = alike(MAPS, query=query, key=key)
    if key.shape != query.shape:
        raise ValueError(f"key must have the query's shape {shape_of(query)}, got {shape_of(key)}")
    kernel, step = _checked_sizes(query, kernel_size, dilation)
    if rpb is not None:
        check_table("rpb", rpb, query, query.shape[1], kernel)
    scores = _Scores.apply(query, key, kernel, step)
    if rpb is None:
        return scores
    rows, columns = (
        axis_keys(range(length), length, AxisWindow(k, d)).offset.to(query.device) + k - 1
        for length, k, d in zip(query.shape[2:4], kernel, step, strict=True)
    )
    # In float32, because the table's gradient is a sum over all queries that is rounded once.
    table = _wide(rpb)[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(-2)
    return (_wide(scores) + table).to(scores.dtype)


def na2d_av(
    attn: torch.Tensor,
    value: torch.Tensor,
    kernel_size: SizePerAxis,
    dilation: SizePerAxis = 1,
    additional_values: torch.Tensor | None = None,
    is_causal: Causal = False,
) -> torch.Tensor:
    """Sum of the values of every query's neighborhood, weighted by ``attn``.

    Args:
        attn: ``(batch, heads, height, width, kernel_height * kernel_width)``, in the order of ``na2d_qk``.
        value: ``(batch, heads, height, width, head_dim)``, the same dtype.
        kernel_size, dilation: as for ``na2d_qk``.

    Returns:
        ``(batch, heads, height, width, head_dim)``.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. NotImplementedError: additional values, causal masks.
    """
    refuse_causal(is_causal)
    refuse("additional_values", additional_values, "additional values", allowed=additional_values is None)
    attn, value = alike(MAPS, attn=attn, value=value)
    kernel, step = _checked_sizes(value, kernel_size, dilation)
    if shape_of(attn) != (*value.shape[:4], kernel[0] * kernel[1]):
        raise ValueError(
            "attn must be (batch, heads, height, width, kernel_height * kernel_width) ="
            f" {(*value.shape[:4], kernel[0] * kernel[1])}, got {shape_of(attn)}"
        )
    return _Gather.apply(attn, value, kernel, step)


def natten2dqkrpb(
    query: torch.Tensor,
    key: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: SizePerAxis,
    dilation: SizePerAxis,
) -> torch.Tensor:
    """``na2d_qk`` under its name before 0.17, which StyleNAT, NAT and DiNAT (also in transformers) use."""
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dav(
    attn: torch.Tensor, value: torch.Tensor, kernel_size: SizePerAxis, dilation: SizePerAxis
) -> torch.Tensor:
    """``na2d_av`` under its name before 0.17."""
    return na2d_av(attn, value, kernel_size, dilation)


def _checked_sizes(maps: torch.Tensor, kernel_size: Any, dilation: Any) -> tuple[Extents, Extents]:
    kernel, step = pair_of("kernel_size", kernel_size), pair_of("dilation", dilation)
    neighborhood_of(maps.shape[2:4], 1, kernel, step)
    return kernel, step


# ---------------------------------------------------------------------------------------------- bilinear maps
#
# With j(i, n) the n-th key of query i there are three bilinear maps, and the derivatives of each are the other two:
#     scores[i, n]  = a[i] . b[j(i, n)]
#     gather[i]     = sum over n of w[i, n] * b[j(i, n)]
#     scatter[j]    = sum over (i, n) with j(i, n) = j of w[i, n] * a[i]
# so autograd differentiates them to any order. Each goes through the keys of the neighborhood one at a time, holding
# one map besides its arguments, and adds in float32 where the maps are half precision. Sums start as zeros like a
# product of both arguments, since under vmap either may be the batched one.


class _Bilinear(torch.autograd.Function):
    """What the three have in common."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        first, second, *ctx.sizes = inputs
        ctx.save_for_backward(first, second)


class _Scores(_Bilinear):
    @staticmethod
    def forward(a, b, kernel, step):
        wide = _wide(a)
        columns = [((wide * shifted).sum(-1)) for shifted, _ in _shifts(_wide(b), kernel, step)]
        return torch.stack(columns, -1).to(a.dtype)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return (
            _Gather.apply(grad, b, *ctx.sizes) if ctx.needs_input_grad[0] else None,
            _Scatter.apply(grad, a, *ctx.sizes) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _Gather(_Bilinear):
    @staticmethod
    def forward(w, b, kernel, step):
        total = torch.zeros_like(_wide(b) * w[..., :1])
        for shifted, n in _shifts(_wide(b), kernel, step):
            total.addcmul_(w[..., n : n + 1].to(total.dtype), shifted)
        return total.to(b.dtype)

    @staticmethod
    def backward(ctx, grad):
        w, b = ctx.saved_tensors
        return (
            _Scores.apply(grad, b, *ctx.sizes) if ctx.needs_input_grad[0] else None,
            _Scatter.apply(w, grad, *ctx.sizes) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _Scatter(_Bilinear):
    @staticmethod
    def forward(w, a, kernel, step):
        wide = _wide(a)
        rows, columns = _indices(a, kernel, step)
        total = torch.zeros_like(wide * w[..., :1])
        for n in range(kernel[0] * kernel[1]):
            product = wide * w[..., n : n + 1].to(wide.dtype)
            across = torch.zeros_like(product).index_add_(3, columns[:, n % kernel[1]], product)
            total.index_add_(2, rows[:, n // kernel[1]], across)
        return total.to(a.dtype)

    @staticmethod
    def backward(ctx, grad):
        w, a = ctx.saved_tensors
        return (
            _Scores.apply(a, grad, *ctx.sizes) if ctx.needs_input_grad[0] else None,
            _Gather.apply(w, grad, *ctx.sizes) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _indices(maps: torch.Tensor, kernel: Extents, step: Extents) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of every query on the two axes: ``(height, kernel_height)`` and ``(width, kernel_width)``."""
    pairs = zip(maps.shape[2:4], kernel, step, strict=True)
    rows, columns = (axis_keys(range(length), length, AxisWindow(k, d)).index.to(maps.device) for length, k, d in pairs)
    return rows, columns


def _shifts(maps: torch.Tensor, kernel: Extents, step: Extents):
    """The map of every query's n-th key, and n, for n in row-major order."""
    rows, columns = _indices(maps, kernel, step)
    for n in range(kernel[0] * kernel[1]):
        yield maps.index_select(2, rows[:, n // kernel[1]]).index_select(3, columns[:, n % kernel[1]]), n
