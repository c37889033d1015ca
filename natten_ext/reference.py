"""The attention in plain PyTorch: the definition in code, differentiable to any order, on any device.

It stores all scores, so its memory grows with tokens times keys. It is what the fused backends are
tested against, what the benchmark calls naive, and the fallback for what no fused backend can run.
"""

from __future__ import annotations

import torch

from .geometry import AnyNeighborhood, Full, Grid, neighbor_indices, neighbor_offsets, window_offsets


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    neighborhood: AnyNeighborhood,
    score: str,
    scale: float,
) -> torch.Tensor:
    """Attention over ``neighborhood``; shapes as in the public functions of ``natten_ext.functional``."""
    if score == "l2":
        # -s|q-k|^2 = 2s q.k - s|k|^2 - s|q|^2, and softmax removes what is constant along a row.
        key_bias = -scale * key.square().sum(-1)
        scale = 2 * scale
    else:
        key_bias = None
    if bias is not None:
        bias = bias.to(query.dtype)
    if isinstance(neighborhood, Full):
        return _full(query, key, value, None, key_bias, scale)
    if isinstance(neighborhood, Grid):
        return _grid(query, key, value, bias, key_bias, scale, neighborhood)
    if len(neighborhood.head_groups()) == 1:
        return _neighborhood(query, key, value, bias, key_bias, scale, neighborhood, 0)
    parts = []
    for first, last in neighborhood.head_groups():
        heads = slice(first, last)
        group_bias = None if bias is None else bias[heads]
        group_key_bias = None if key_bias is None else key_bias[..., heads]
        group = query[..., heads, :], key[..., heads, :], value[..., heads, :]
        parts.append(_neighborhood(*group, group_bias, group_key_bias, scale, neighborhood, first))
    return torch.cat(parts, dim=-2)


def _full(query, key, value, bias, key_bias, scale):
    """Sequences ``(batch, tokens, heads, head_dim)``; bias ``(heads, queries, keys)``."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = (query * scale) @ key.transpose(-2, -1)
    if key_bias is not None:
        scores = scores + key_bias.transpose(1, 2).unsqueeze(-2)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _grid(query, key, value, bias, key_bias, scale, neighborhood):
    batch, height, width, heads, head_dim = query.shape
    rows, columns = neighborhood.window

    def partition(x):
        x = x.reshape(batch, height // rows, rows, width // columns, columns, *x.shape[3:])
        return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)

    if bias is not None:
        dy = (window_offsets(rows) + rows - 1).to(bias.device)
        dx = (window_offsets(columns) + columns - 1).to(bias.device)
        bias = bias[:, dy[:, None, :, None], dx[None, :, None, :]].reshape(heads, rows * columns, rows * columns)
    key_bias = None if key_bias is None else partition(key_bias)
    output = _full(partition(query), partition(key), partition(value), bias, key_bias, scale)
    output = output.reshape(batch, height // rows, width // columns, rows, columns, heads, head_dim)
    return output.transpose(2, 3).reshape(query.shape)


def _neighborhood(query, key, value, bias, key_bias, scale, neighborhood, head):
    """Heads that share the kernel and the dilation of ``head``: keys are gathered per query."""
    height, width = query.shape[1:3]
    (rows, columns), (step_y, step_x) = neighborhood.kernels[head], neighborhood.dilations[head]
    y = neighbor_indices(height, rows, step_y).to(query.device)[:, None, :, None]
    x = neighbor_indices(width, columns, step_x).to(query.device)[None, :, None, :]

    def gather(tensor):
        """``(batch, height, width, heads, ...)`` to ``(batch, height, width, heads, keys, ...)``."""
        return tensor[:, y, x].flatten(3, 4).transpose(3, 4)

    scores = (gather(key) @ (query * scale).unsqueeze(-1)).squeeze(-1)
    if key_bias is not None:
        scores = scores + gather(key_bias)
    if bias is not None:
        largest_rows, largest_columns = neighborhood.kernel
        dy = neighbor_offsets(height, rows, step_y).to(query.device)[:, None, :, None] + largest_rows - 1
        dx = neighbor_offsets(width, columns, step_x).to(query.device)[None, :, None, :] + largest_columns - 1
        scores = scores + bias[:, dy, dx].flatten(3, 4).permute(1, 2, 0, 3)
    return (scores.softmax(-1).unsqueeze(-2) @ gather(value)).squeeze(-2)
