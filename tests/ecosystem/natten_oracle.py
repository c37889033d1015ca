"""NATTEN's unfused functions by the oracle's lists of keys: what clients of natten are run with a second time."""

from __future__ import annotations

import torch

from tests.operators import oracle


def qk(query, key, kernel, dilation, rpb=None, causal=None):
    """Scores ``(batch, heads, *map, keys)`` of maps ``(batch, heads, *map, head_dim)``; sizes are tuples."""
    axes = query.dim() - 3
    index, exists, offsets = _keys(tuple(query.shape[2:-1]), kernel, dilation, causal or (False,) * axes)
    gathered = key.flatten(2, -2)[:, :, index]
    scores = (query.flatten(2, -2).unsqueeze(3) * gathered).sum(-1)
    if rpb is not None:
        scores = scores + rpb[(slice(None), *offsets)]
    return scores.masked_fill(~exists, -torch.inf).unflatten(2, query.shape[2:-1])


def av(attn, value, kernel, dilation, causal=None):
    axes = value.dim() - 3
    index, exists, _ = _keys(tuple(value.shape[2:-1]), kernel, dilation, causal or (False,) * axes)
    gathered = value.flatten(2, -2)[:, :, index]
    return (attn.flatten(2, -2).masked_fill(~exists, 0).unsqueeze(-1) * gathered).sum(-2).view_as(value)


def natten2dqkrpb(query, key, rpb, kernel_size, dilation):
    return qk(query, key, (kernel_size,) * 2, (dilation,) * 2, rpb)


def natten2dav(attn, value, kernel_size, dilation):
    return av(attn, value, (kernel_size,) * 2, (dilation,) * 2)


def _keys(extents, kernel, dilation, causal):
    """Of every query: where its keys are, ``(queries, keys)``, which of them exist, and their places in a table."""
    strides = (1,) * len(extents)
    lists = oracle.sliding_neighbors(extents, kernel, dilation, strides, causal)
    count = max(map(len, lists))
    filled = [[*entries, *[entries[0]] * (count - len(entries))] for entries in lists]
    index = torch.tensor([[key for key, _ in entries] for entries in filled])
    exists = torch.tensor([[n < len(entries) for n in range(count)] for entries in lists])
    offsets = torch.tensor([[offset for _, offset in entries] for entries in filled])
    return index, exists, [of_axis + k - 1 for of_axis, k in zip(offsets.unbind(-1), kernel, strict=True)]
