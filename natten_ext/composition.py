"""What the public functions take beyond what operators compute, made of operators.

Operators have one width of vectors, windows that divide the map, and one set of keys, and heads that share keys have
one window. Other widths of values, windows that are shifted or cut off by borders, heads with windows of their own that
share keys, and keys that every query attends besides, come down to these exactly, with every derivative.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .backends import reference
from .backends.choice import SHARING
from .geometry import AnyNeighborhood, Full, Grid
from .merging import merge_attention
from .operators import CALLS

Results = tuple[Tensor, Tensor | None]
"""The output, and the log-sum-exp where it is asked for."""


class Call(NamedTuple):
    """What a call of a public function says besides its tensors."""

    backend: str
    score: str
    scale: float
    return_lse: bool


def attend(
    call: Call, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, neighborhood: AnyNeighborhood
) -> Results:
    """Attention with heads that share keys, and values of any width."""
    heads, key_heads = query.shape[-2], key.shape[-2]
    if heads == key_heads:
        return _one_width(call, query, key, value, bias, neighborhood)
    # With one key head that takes views, no copies.
    if isinstance(neighborhood, Full) and (key_heads == 1 or Full.kind not in SHARING[call.backend]):
        return _as_queries_of_one(call, query, key, value)
    key, value = (shareable(x, heads, neighborhood) for x in (key, value))
    return _one_width(call, query, key, value, bias, neighborhood)


def shareable(x: Tensor, heads: int, neighborhood: AnyNeighborhood) -> Tensor:
    """Keys or values of which so many heads with one window share each head: repeated where they have several."""
    return repeat_heads(x, heads // neighborhood.sharing(heads // x.shape[-2]))


def _as_queries_of_one(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Results:
    """Full attention of query heads that share keys: they are more queries of one head."""
    tokens, heads = query.shape[1:3]
    shared = key.shape[-2], heads // key.shape[-2]

    def queries_of(x: Tensor) -> Tensor:
        return x.unflatten(2, shared).transpose(2, 3).flatten(1, 2)

    def heads_of(x: Tensor) -> Tensor:
        return x.unflatten(1, (tokens, shared[1])).transpose(2, 3).flatten(2, 3)

    output, lse = _one_width(call, queries_of(query), key, value, None, Full())
    return heads_of(output), None if lse is None else heads_of(lse)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """``(..., key heads, channels)`` with so many heads, each of them repeated next to itself."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], -2)


def _one_width(
    call: Call, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, neighborhood: AnyNeighborhood
) -> Results:
    """Attention with values of another width than queries and keys: channels of zeros change nothing."""
    width, of_values = query.shape[-1], value.shape[-1]
    if width < of_values:
        query, key = (pad(x, (0, of_values - width)) for x in (query, key))
    elif of_values < width:
        value = pad(value, (0, width - of_values))
    if call.backend == "reference":
        output, lse = reference.attention(
            query, key, value, bias, neighborhood, call.score, call.scale, call.return_lse
        )
    else:
        choices = neighborhood.encode(), call.score == "l2", call.scale
        output, _, lse = CALLS[call.backend].forward(query, key, value, bias, *choices, call.return_lse)
        lse = lse.movedim(1, -1) if call.return_lse else None
    return output if of_values == output.shape[-1] else output[..., :of_values], lse


# ---------------------------------------------------------------------------------------------- windows cut by borders


def attend_in_windows(
    call: Call, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, grid: Grid
) -> Results:
    """Attention in windows that the borders of the map cut off: of its part with whole windows, and of those with cut
    ones."""
    window = grid.window
    segments = [list(_segments(*axis)) for axis in zip(query.shape[1:-2], window, grid.first, strict=True)]
    lengths = [[length for length, _ in of_axis] for of_axis in segments]
    operands = zip(*(_divided(x, lengths) for x in (query, key, value)), strict=True)
    parts = []
    for part, of_each in zip(itertools.product(*segments), operands, strict=True):
        of_part = tuple(extent for _, extent in part)
        table = None
        if bias is not None:
            middles = (slice(size - extent, size + extent - 1) for size, extent in zip(window, of_part, strict=True))
            table = bias[(slice(None), *middles)]
        parts.append(attend(call, *of_each, table, Grid(of_part)))
    counts = [len(segment) for segment in segments]
    outputs, lses = zip(*parts, strict=True)
    return _joined(outputs, counts), _joined(lses, counts) if call.return_lse else None


def _segments(length: int, window: int, shift: int) -> Iterator[tuple[int, int]]:
    """(length, window) of the parts of an axis whose windows are alike: cut ones, whole ones, cut ones."""
    first = min(shift, length)
    whole = (length - first) // window * window
    last = length - first - whole
    yield from (s for s in ((first, first), (whole, window), (last, last)) if s[0])


def _divided(x: Tensor, lengths: Sequence[Sequence[int]]) -> list[Tensor]:
    """The parts of a map, of these lengths on each axis. Their gradients are joined once, not padded and added up."""
    parts = [x]
    for axis, of_axis in enumerate(lengths):
        parts = [piece for part in parts for piece in part.split(of_axis, 1 + axis)]
    return parts


def _joined(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The map of its parts, which are so many on each axis."""
    for axis in reversed(range(len(counts))):
        step = counts[axis]
        parts = [torch.cat(parts[i : i + step], 1 + axis) for i in range(0, len(parts), step)]
    return parts[0]


# ---------------------------------------------------------------------------------------------- keys besides


def attend_more(
    call: Call, results: Results, query: Tensor, additional_keys: Tensor, additional_values: Tensor
) -> Results:
    """What results of a map become with keys that every query attends besides, in one softmax."""
    extents = query.shape[1:-2]
    others = attend(call, query.flatten(1, -3), additional_keys, additional_values, None, Full())
    output, lse = (x.unflatten(1, extents) for x in others)
    return merge_attention([results[0], output], [results[1], lse])
