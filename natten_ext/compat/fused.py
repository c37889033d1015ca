"""The fused attention of this package with NATTEN's arguments: what both generations of its functions call."""

from __future__ import annotations

import torch

from .. import functional
from ..checks import MAPS, check_bias, check_dense, checked_additional, checked_maps, neighborhood_of, shape_of
from .arguments import Flags, Size, flags, sizes

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def fused(
    axes: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Size,
    stride: Size,
    dilation: Size,
    is_causal: Flags,
    rpb: torch.Tensor | None,
    scale: float | None,
    additional_keys: torch.Tensor | None,
    additional_values: torch.Tensor | None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Result:
    """``neighborhood_attention`` on maps of so many axes (None: as many as the query has)."""
    check_dense("query", query)
    if axes is not None and query.dim() != axes + 3:
        raise ValueError(f"query must have {axes + 3} dimensions {MAPS[axes]}, got shape {shape_of(query)}")
    query, key, value = checked_maps(query, key, value)
    extents, heads = query.shape[1:-2], query.shape[-2]
    axes = len(extents)
    named = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride}
    windows = (sizes(name, size, axes) for name, size in named.items())
    neighborhood = neighborhood_of(extents, heads, *windows, flags("is_causal", is_causal, axes))
    check_bias("rpb", rpb, query, neighborhood)
    more = checked_additional(query, additional_keys, additional_values)
    return functional.run(query, key, value, rpb, neighborhood, "dot", scale, backend, return_lse, *more)
