"""The functions of NATTEN 0.21, over the fused attention of this package.

Tuning of NATTEN's kernels (tile shapes, schedules, splits, names of its backends) is accepted and has no effect, which
is said once in a process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import functional
from ..checks import check_bool, check_dense, shape_of
from ..merging import merge_attention
from .arguments import Flags, Size, for_axes, own_backend, refuse
from .fused import Result, fused
from .modules import Since020


def _na(axes: int | None) -> Callable[..., Result]:
    def na(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kernel_size: Size,
        stride: Size = 1,
        dilation: Size = 1,
        is_causal: Flags = False,
        scale: float | None = None,
        additional_keys: torch.Tensor | None = None,
        additional_values: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: tuple[int, ...] | None = None,
        kv_tile_shape: tuple[int, ...] | None = None,
        backward_q_tile_shape: tuple[int, ...] | None = None,
        backward_kv_tile_shape: tuple[int, ...] | None = None,
        backward_kv_splits: tuple[int, ...] | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: str | None = None,
        torch_compile: bool = False,
        return_lse: bool = False,
        *,
        rpb: torch.Tensor | None = None,
    ) -> Result:
        """Neighborhood attention with the signature of ``natten.na{axes}d`` (NATTEN 0.21), and three derivative orders.

        ``rpb``, the relative position table that NATTEN dropped in 0.20, is here again. ``neighborhood_attention`` also
        takes kernels and dilations per group of heads, and other scores.

        Args:
            query, key, value: ``(batch, *map, heads, head_dim)`` with a map of {axes} axes; key and value may have
                fewer heads and value another width, as in ``neighborhood_attention``.
            kernel_size, stride, dilation, is_causal: one for all map axes, or a tuple (or, unlike in
                ``neighborhood_attention``, a list) with one per axis.
            scale: positive factor of the score; ``head_dim ** -0.5`` if None.
            additional_keys, additional_values: ``(batch, tokens, heads, head_dim)``, which every query attends as well.
            backend: a name from ``natten_ext.list_backends()``; one of NATTEN's has no effect.
            return_lse: whether to return the log-sum-exp as well, as ``neighborhood_attention`` does.
            rpb: ``(heads, *(2 * kernel_size - 1))``, added to the scaled scores.
            Others: NATTEN's tuning, without effect.

        Returns:
            ``(batch, *map, heads, width of value)``; with ``return_lse`` a tuple of it and the log-sum-exp.

        Raises:
            As ``neighborhood_attention``.
        """
        tuning = {
            "attention_kwargs": (attention_kwargs, None),
            "q_tile_shape": (q_tile_shape, None),
            "kv_tile_shape": (kv_tile_shape, None),
            "backward_q_tile_shape": (backward_q_tile_shape, None),
            "backward_kv_tile_shape": (backward_kv_tile_shape, None),
            "backward_kv_splits": (backward_kv_splits, None),
            "backward_use_pt_reduction": (backward_use_pt_reduction, False),
            "run_persistent_kernel": (run_persistent_kernel, True),
            "kernel_schedule": (kernel_schedule, None),
            "torch_compile": (torch_compile, False),
        }
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
            own_backend(backend, tuning),
            return_lse,
        )

    return na


na1d, na2d, na3d = for_axes("na{axes}d", _na)
neighborhood_attention_generic = _na(None)
neighborhood_attention_generic.__name__ = neighborhood_attention_generic.__qualname__ = "neighborhood_attention_generic"
neighborhood_attention_generic.__doc__ = "``na1d``, ``na2d`` or ``na3d``, by the number of dimensions of the query."


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: torch.Tensor | None = None,
    seqlens_KV: torch.Tensor | None = None,
    cumulative_seqlen_Q: torch.Tensor | None = None,
    cumulative_seqlen_KV: torch.Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Result:
    """``natten_ext.attention`` with the signature of ``natten.attention``, and causal masks.

    Args:
        query: ``(batch, queries, heads, head_dim)``.
        key, value: ``(batch, keys, heads, head_dim)``, with fewer heads or another width of value as there.
        is_causal: whether a query sees the keys up to its own place only; queries and keys must be as many.
        scale, backend, return_lse: as ``na1d``.
        Others: lengths of packed sequences, which raise NotImplementedError, and NATTEN's tuning, without effect.

    Returns, Raises:
        As ``na1d``.
    """
    packed = {
        "seqlens_Q": seqlens_Q,
        "seqlens_KV": seqlens_KV,
        "cumulative_seqlen_Q": cumulative_seqlen_Q,
        "cumulative_seqlen_KV": cumulative_seqlen_KV,
        "max_seqlen_Q": max_seqlen_Q,
        "max_seqlen_KV": max_seqlen_KV,
    }
    for name, given in packed.items():
        refuse(name, given, "packed sequences of several lengths", allowed=given is None)
    tuning = {
        "q_tile_size": (q_tile_size, None),
        "kv_tile_size": (kv_tile_size, None),
        "backward_q_tile_size": (backward_q_tile_size, None),
        "backward_kv_tile_size": (backward_kv_tile_size, None),
        "backward_kv_splits": (backward_kv_splits, None),
        "backward_use_pt_reduction": (backward_use_pt_reduction, False),
        "run_persistent_kernel": (run_persistent_kernel, True),
        "kernel_schedule": (kernel_schedule, None),
        "torch_compile": (torch_compile, False),
    }
    backend = own_backend(backend, tuning)
    check_bool("is_causal", is_causal)
    options = {"scale": scale, "backend": backend, "return_lse": return_lse}
    if not is_causal:
        return functional.attention(query, key, value, **options)
    check_dense("query", query)
    check_dense("key", key)
    if query.dim() != 4 or key.shape[1:2] != query.shape[1:2]:
        raise ValueError(
            "is_causal needs as many keys as queries, (batch, tokens, heads, head_dim),"
            f" got {shape_of(query)} and {shape_of(key)}"
        )
    return functional.neighborhood_attention(query, key, value, query.shape[1], is_causal=True, **options)


def merge_attentions(
    outputs: Sequence[torch.Tensor],
    lse_tensors: Sequence[torch.Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``natten_ext.merge_attention``; unlike in NATTEN its derivatives are exact of what is merged, whatever that is.

    ``torch_compile`` and ``use_autograd_fix`` have no effect.
    """
    return merge_attention(outputs, lse_tensors)


class NeighborhoodAttention1D(Since020):
    __doc__ = Since020.__doc__
    axes = 1


class NeighborhoodAttention2D(Since020):
    __doc__ = Since020.__doc__
    axes = 2


class NeighborhoodAttention3D(Since020):
    __doc__ = Since020.__doc__
    axes = 3
