"""Where the keys of an attention lie, so that scores can be computed about that place rather than about zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..orders import Order

# Beyond this the square of a float32 overflows, and there is nothing to win.
_LARGEST = 1e18


def origin_of(key: torch.Tensor) -> torch.Tensor:
    """A vector amid the keys of each batch and head, to subtract from queries and keys before l2 scores.

    -|q-k|^2 is computed as 2 q.k - |k|^2 (- |q|^2, which softmax removes), which cancels where all vectors lie far from
    zero. A vector subtracted from every query and key of a batch and head changes no distance, and no derivative. It
    is the median, per channel, of nine keys spread over the tokens: where a few of them lie far from the rest, or hold
    NaN or infinity, the rest lose nothing.

    Args:
        key: ``(batch, tokens, heads, head_dim)`` or ``(batch, *map, heads, head_dim)``, at least one token.

    Returns:
        The same with one token: the key's dtype, detached; finite.
    """
    tokens = key.detach().flatten(1, -3)
    step = -(-tokens.shape[1] // 9)
    sample = tokens[:, step // 2 :: step] if step > 1 else tokens
    # Sorted, for CUDA's median is not deterministic. NaN comes last.
    middle = sample.sort(1).values[:, (sample.shape[1] - 1) // 2 : (sample.shape[1] + 1) // 2]
    middle = torch.where(middle.abs() < _LARGEST, middle, 0)
    return middle.unflatten(1, (1,) * (key.dim() - 3))


def about_origin(order: Order, arguments: Sequence[Any], *, tf32: bool) -> list[Any]:
    """Arguments of an order with l2 scores for kernels that make distances of products: query and key about an origin.

    Where products are computed in TF32, they and their cotangents are rounded to it here, which products do anyway. But
    the squares that products are subtracted from must be of the same numbers: those of two vectors of norm 100 would
    differ from their product by ten, wherever the two are.
    """
    arguments = [*arguments]
    place = order.query
    arguments[place : place + 2] = _less_origin(*arguments[place : place + 2])
    if tf32:
        for index, name in enumerate(order.types):
            if name in ("query", "key", "cot_query", "cot_key") and arguments[index] is not None:
                arguments[index] = _rounded_to_tf32(arguments[index])
    return arguments


def _rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """To 11 bits, ties away from zero as the GPU's own conversion; NaN and infinity stay."""
    rounded = x.view(torch.int32).add(1 << 12).bitwise_and(-1 << 13).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def _less_origin(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key less ``origin_of(key)``: the same distances and derivatives, from smaller numbers.

    In half precision only channels are moved in which all elements are within half of the origin from it: then the
    difference of two numbers of a format is a number of that format, and nothing is rounded.
    """
    query = query.unflatten(-2, (key.shape[-2], -1))  # by the key head that they share
    origin = origin_of(key).unsqueeze(-2)
    if query.dtype.itemsize == 2:
        others = (*range(1, query.dim() - 3), -2)
        near = [((x - origin).abs() <= origin.abs() / 2).all(others, keepdim=True) for x in (query, key.unsqueeze(-2))]
        origin = torch.where(near[0] & near[1], origin, 0)
    return (query - origin).flatten(-3, -2), key - origin.squeeze(-2)
