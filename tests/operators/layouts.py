"""Ways to lay the same numbers out in memory: views of one projection, permuted dimensions, odd addresses."""

from __future__ import annotations

import torch

from tests.operators.cases import Inputs


def packed(inputs: Inputs) -> Inputs:
    """Query, key and value as views of one tensor (..., heads of all three, head_dim), as a projection makes them."""
    names = "query", "key", "value"
    views = torch.cat([inputs[n] for n in names], -2).split([inputs[n].shape[-2] for n in names], -2)
    return inputs | dict(zip(names, views, strict=True))


def heads_first(inputs: Inputs) -> Inputs:
    """Laid out as (batch, heads, tokens, head_dim) in memory."""
    return {n: t if n == "bias" else t.movedim(-2, 1).contiguous().movedim(1, -2) for n, t in inputs.items()}


def batch_inside(inputs: Inputs) -> Inputs:
    """Laid out as (tokens, heads, batch, head_dim) in memory."""
    return {n: t if n == "bias" else t.movedim(0, -2).contiguous().movedim(-2, 0) for n, t in inputs.items()}


def transposed_map(inputs: Inputs) -> Inputs:
    """Laid out with width before height in memory."""
    return {n: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 5 else t for n, t in inputs.items()}


def odd_address(inputs: Inputs) -> Inputs:
    """A part of a wider tensor: rows start at addresses that no vector is aligned to."""
    return {n: torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for n, t in inputs.items()}


def every_second_token(inputs: Inputs) -> Inputs:
    return {n: t if n == "bias" else t.repeat_interleave(2, dim=1)[:, ::2] for n, t in inputs.items()}


def channels_apart(inputs: Inputs) -> Inputs:
    """The last dimension is not contiguous."""
    return {n: t.transpose(-1, -2).contiguous().transpose(-1, -2) for n, t in inputs.items()}


def every_second_channel(inputs: Inputs) -> Inputs:
    return {n: t.repeat_interleave(2, dim=-1)[..., ::2] for n, t in inputs.items()}


LAYOUTS = [
    packed,
    heads_first,
    batch_inside,
    transposed_map,
    odd_address,
    every_second_token,
    channels_apart,
    every_second_channel,
]
