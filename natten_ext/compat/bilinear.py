"""The three bilinear maps that unfused neighborhood attention consists of, on maps ``(batch, heads, *map, channels)``.

With j(i, n) the n-th key of query i there are three, and the derivatives of each are the other two:

    scores[i, n]  = a[i] . b[j(i, n)]
    gather[i]     = sum over n of w[i, n] * b[j(i, n)]
    scatter[j]    = sum over (i, n) with j(i, n) = j of w[i, n] * a[i]

so autograd differentiates them to any order. Each goes through the keys of the neighborhood one at a time, holding one
map for each map axis besides its arguments, and adds in float32 where the maps are half precision. Sums start as zeros
like a product of both arguments, since under vmap either may be the batched one.

A query with fewer keys (near the start of a causal axis) has its first key again in the place of the missing; masks are
the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..geometry import AxisKeys, HeadWindow, axis_keys
from ..orders import accumulation_dtype


def keys_of(maps: torch.Tensor, windows: HeadWindow) -> list[AxisKeys]:
    """The keys of every query on each map axis, ``(length, kernel)``, on the device of the maps."""
    found = []
    for length, window in zip(maps.shape[2:], windows, strict=False):
        found.append(AxisKeys(*(part.to(maps.device) for part in axis_keys(range(length), length, window))))
    return found


def wide(x: torch.Tensor) -> torch.Tensor:
    """In the precision of sums."""
    return x.to(accumulation_dtype(x.dtype))


class _Bilinear(torch.autograd.Function):
    """What the three have in common."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        first, second, ctx.windows = inputs
        ctx.save_for_backward(first, second)


class Scores(_Bilinear):
    """``(a, b, windows)``, to ``(batch, heads, *map, keys)``; keys in row-major order."""

    @staticmethod
    def forward(a, b, windows):
        wide_a = wide(a)
        columns = [(wide_a * shifted).sum(-1) for shifted in _shifted(wide(b), _indices(b, windows))]
        return torch.stack(columns, -1).to(a.dtype)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return (
            Gather.apply(grad, b, ctx.windows) if ctx.needs_input_grad[0] else None,
            Scatter.apply(grad, a, ctx.windows) if ctx.needs_input_grad[1] else None,
            None,
        )


class Gather(_Bilinear):
    """``(w, b, windows)``, to the shape of b."""

    @staticmethod
    def forward(w, b, windows):
        total = torch.zeros_like(wide(b) * w[..., :1])
        for n, shifted in enumerate(_shifted(wide(b), _indices(b, windows))):
            total.addcmul_(w[..., n : n + 1].to(total.dtype), shifted)
        return total.to(b.dtype)

    @staticmethod
    def backward(ctx, grad):
        w, b = ctx.saved_tensors
        return (
            Scores.apply(grad, b, ctx.windows) if ctx.needs_input_grad[0] else None,
            Scatter.apply(w, grad, ctx.windows) if ctx.needs_input_grad[1] else None,
            None,
        )


class Scatter(_Bilinear):
    """``(w, a, windows)``, to the shape of a: the transpose of ``Gather``."""

    @staticmethod
    def forward(w, a, windows):
        wide_a = wide(a)
        products = (wide_a * w[..., n : n + 1].to(wide_a.dtype) for n in range(w.shape[-1]))
        return _sent(products, _indices(a, windows)).to(a.dtype)

    @staticmethod
    def backward(ctx, grad):
        w, a = ctx.saved_tensors
        return (
            Scores.apply(a, grad, ctx.windows) if ctx.needs_input_grad[0] else None,
            Gather.apply(w, grad, ctx.windows) if ctx.needs_input_grad[1] else None,
            None,
        )


def _indices(maps: torch.Tensor, windows: HeadWindow) -> list[torch.Tensor]:
    return [keys.index for keys in keys_of(maps, windows)]


def _axis(maps: torch.Tensor, indices: list[torch.Tensor]) -> int:
    """The dimension of the first of the last ``len(indices)`` map axes."""
    return maps.dim() - 1 - len(indices)


def _shifted(maps: torch.Tensor, indices: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The map of every query's n-th key, for each n in row-major order."""
    if not indices:
        yield maps
        return
    first, *others = indices
    for keys in first.unbind(1):
        yield from _shifted(maps.index_select(_axis(maps, indices), keys), others)


def _sent(products: Iterator[torch.Tensor], indices: list[torch.Tensor]) -> torch.Tensor:
    """What the queries send to their n-th keys, ``products`` in the order of ``_shifted``, added where it arrives."""
    if not indices:
        return next(products)
    first, *others = indices
    total = None
    for keys in first.unbind(1):
        part = _sent(products, others)
        total = torch.zeros_like(part) if total is None else total
        total.index_add_(_axis(part, indices), keys, part)
    return total
