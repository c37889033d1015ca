"""Other ways to write neighborhood attention in plain PyTorch, so that "naive" is never a straw man.

``naive`` itself is natten_ext's reference backend: window partition, matmul, table lookup, softmax and matmul for
grids; matmul with the key norms as a bias for L2; a gather of every query's keys for neighborhoods. For neighborhoods
two more forms exist, and ratios are taken against whichever is fastest for the order at hand:

- ``naive-mask``: all pairs of the map with a mask, on maps of up to 1024 tokens; wasteful, but one matrix product;
- ``naive-loop``: a loop over the kernel's offsets, which never gathers more than one key per query at a time.
"""

from __future__ import annotations

import math

import torch

from .layout import dense_bias, dense_index, heads_first, heads_last, lookup, neighborhood_index
from .problem import Attend
from .shapes import Shape

MASK_LIMIT = 1024


def covers(name: str, shape: Shape) -> bool:
    """Whether the form of naive called ``name`` is worth running for ``shape``."""
    if name == "naive":
        return True
    return shape.kind == "neighborhood" and (name != "naive-mask" or shape.queries <= MASK_LIMIT)


def prepare_mask(shape: Shape, device: torch.device, dtype: torch.dtype) -> Attend:
    places, masked = dense_index(shape, device)
    mask = masked.repeat_interleave(shape.heads // len(masked), 0)

    def attend(query, key, value, table):
        query, key, value = map(heads_first, (query, key, value))
        scores = (query * shape.head_dim**-0.5) @ key.transpose(-2, -1)
        if table is not None:
            scores = scores + dense_bias(shape, table, places)
        return heads_last(scores.masked_fill(mask, -math.inf).softmax(-1) @ value, shape)

    return attend


def prepare_loop(shape: Shape, device: torch.device, dtype: torch.dtype) -> Attend:
    groups = []
    for heads, dilation in shape.head_groups:
        keys, places = neighborhood_index(shape, dilation)
        groups.append((heads, keys.t().contiguous().to(device), places.to(device)))

    def attend_group(query, key, value, table, keys, places):
        query, key, value = (x.flatten(1, 2) for x in (query, key, value))
        query = query * shape.head_dim**-0.5
        scores = torch.stack([(query * key.index_select(1, at)).sum(-1) for at in keys], -1)
        if table is not None:
            scores = scores + lookup(table, places).transpose(0, 1)
        weights = scores.softmax(-1)
        output = 0
        for weight, at in zip(weights.unbind(-1), keys, strict=True):
            output = output + weight.unsqueeze(-1) * value.index_select(1, at)
        return output.view(-1, *shape.size, *output.shape[2:])

    def attend(query, key, value, table):
        parts = [
            attend_group(
                *(x[..., heads, :] for x in (query, key, value)), None if table is None else table[heads], keys, places
            )
            for heads, keys, places in groups
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    return attend


VARIANTS = {"naive-mask": prepare_mask, "naive-loop": prepare_loop}
