"""The attention in plain PyTorch: the definition in code, differentiable to any order, on any device.

It stores all scores, so its memory grows with tokens times keys. It is what the fused backends are
tested against, what the benchmark calls naive, and the fallback for what no fused backend can run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import forward_ad

from ..geometry import AnyNeighborhood, Full, Grid, neighbor_indices, neighbor_offsets, window_offsets
from .origin import origin_of


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    neighborhood: AnyNeighborhood,
    score: str,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over ``neighborhood`` and, if asked for, its log-sum-exp; shapes as in ``natten_ext.functional``.

    Half precision is computed, and its derivatives are added up, in float32.
    """
    dtype = query.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with without_autocast(query.device.type):
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
        bias = None if bias is None else bias.to(wide)
        if score == "l2":
            query, key = _distances_as_products(query, key)
        output, lse = _attention(query * scale, key, value, bias, neighborhood, return_lse)
        return output.to(dtype), lse


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which matrix products keep the precision of their arguments."""
    # torch knows no autocast for meta tensors.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Softmax along the last dimension that can be differentiated in every way."""
    if forward_ad._current_level < 0:
        return scores.softmax(-1)
    # The tangent of torch's own can't be differentiated: its formula changes in place what autograd has saved.
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def log_sum_exp(scores: torch.Tensor) -> torch.Tensor:
    """Logarithm of the sum of exponentials along the last dimension that can be differentiated in every way."""
    if forward_ad._current_level < 0:
        return scores.logsumexp(-1)
    largest = scores.detach().amax(-1, keepdim=True)  # as softmax
    largest = torch.where(largest.isinf(), 0, largest)
    return (scores - largest).exp().sum(-1).log() + largest.squeeze(-1)


def _distances_as_products(query, key):
    """Vectors of two more channels whose products are -|q-k|^2 = 2 q.k - |q|^2 - |k|^2.

    Softmax removes |q|^2, but its derivatives keep those of q exact where a key takes all of the weight.
    """
    origin = origin_of(key)
    query, key = query - origin, key - origin
    query_square, key_square = (x.square().sum(-1, keepdim=True) for x in (query, key))
    query = torch.cat([2 * query, -query_square, torch.full_like(query_square, -1)], -1)
    return query, torch.cat([key, torch.ones_like(key_square), key_square], -1)


def _attention(query, key, value, bias, neighborhood, return_lse):
    if isinstance(neighborhood, Full):
        return _full(query, key, value, None, return_lse)
    if isinstance(neighborhood, Grid):
        return _grid(query, key, value, bias, neighborhood, return_lse)
    parts = []
    for first, last in neighborhood.head_groups():
        heads = slice(first, last)
        group_bias = None if bias is None else bias[heads]
        group = query[..., heads, :], key[..., heads, :], value[..., heads, :]
        parts.append(_neighborhood(*group, group_bias, neighborhood, first, return_lse))
    if len(parts) == 1:
        return parts[0]
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, -2), torch.cat(lses, -1) if return_lse else None


def _full(query, key, value, bias, return_lse):
    """Sequences ``(batch, tokens, heads, channels)``; bias ``(heads, queries, keys)``."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return (softmax(scores) @ value).transpose(1, 2), log_sum_exp(scores).transpose(1, 2) if return_lse else None


def _grid(query, key, value, bias, neighborhood, return_lse):
    batch, height, width, heads, _ = value.shape
    rows, columns = neighborhood.window

    def partition(x):
        x = x.reshape(batch, height // rows, rows, width // columns, columns, *x.shape[3:])
        return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)

    def whole(x):
        x = x.reshape(batch, height // rows, width // columns, rows, columns, *x.shape[2:])
        return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)

    if bias is not None:
        dy = (window_offsets(rows) + rows - 1).to(bias.device)
        dx = (window_offsets(columns) + columns - 1).to(bias.device)
        bias = bias[:, dy[:, None, :, None], dx[None, :, None, :]].reshape(heads, rows * columns, rows * columns)
    output, lse = _full(partition(query), partition(key), partition(value), bias, return_lse)
    return whole(output), whole(lse) if return_lse else None


def _neighborhood(query, key, value, bias, neighborhood, head, return_lse):
    """Heads that share the kernel and the dilation of ``head``: keys are gathered per query."""
    height, width = query.shape[1:3]
    (rows, columns), (step_y, step_x) = neighborhood.kernels[head], neighborhood.dilations[head]
    y = neighbor_indices(height, rows, step_y).to(query.device)[:, None, :, None]
    x = neighbor_indices(width, columns, step_x).to(query.device)[None, :, None, :]

    def gather(tensor):
        """``(batch, height, width, heads, channels)`` to ``(batch, height, width, heads, keys, channels)``."""
        return tensor[:, y, x].flatten(3, 4).transpose(3, 4)

    scores = (gather(key) @ query.unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        largest_rows, largest_columns = neighborhood.kernel
        dy = neighbor_offsets(height, rows, step_y).to(query.device)[:, None, :, None] + largest_rows - 1
        dx = neighbor_offsets(width, columns, step_x).to(query.device)[None, :, None, :] + largest_columns - 1
        scores = scores + bias[:, dy, dx].flatten(3, 4).permute(1, 2, 0, 3)
    output = (softmax(scores).unsqueeze(-2) @ gather(value)).squeeze(-2)
    return output, log_sum_exp(scores) if return_lse else None
