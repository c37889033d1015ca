"""The fused functions of NATTEN 0.17, whose arguments come in another order than later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .arguments import Flags, Size, for_axes, own_backend
from .fused import Result, fused
from .modules import Of017


def _na(axes: int) -> Callable[..., Result]:
    def na(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kernel_size: Size,
        dilation: Size = 1,
        is_causal: Flags = False,
        rpb: torch.Tensor | None = None,
        scale: float | None = None,
        additional_keys: torch.Tensor | None = None,
        additional_values: torch.Tensor | None = None,
        xformers_kwargs: dict[str, Any] | None = None,
        *,
        stride: Size = 1,
        backend: str | None = None,
        return_lse: bool = False,
    ) -> Result:
        """Fused neighborhood attention with the arguments in the order of NATTEN 0.17; see ``natten_ext.na{axes}d``.

        Maps are ``(batch, *map, heads, head_dim)``, unlike those of ``na{axes}d_qk``. ``xformers_kwargs`` has no
        effect.
        """
        backend = own_backend(backend, {"xformers_kwargs": (xformers_kwargs, None)})
        return fused(
            axes,
            query,
            key,
            value,
            kernel_size,
            stride,
            dilation,
            is_causal,
            rpb,
            scale,
            additional_keys,
            additional_values,
            backend,
            return_lse,
        )

    return na


na1d, na2d, na3d = for_axes("na{axes}d", _na)


class NeighborhoodAttention1D(Of017):
    __doc__ = Of017.__doc__
    axes = 1


class NeighborhoodAttention2D(Of017):
    __doc__ = Of017.__doc__
    axes = 2


class NeighborhoodAttention3D(Of017):
    __doc__ = Of017.__doc__
    axes = 3
