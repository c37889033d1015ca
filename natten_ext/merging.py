"""Attention over several sets of keys, from the attention over each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .backends.reference import log_sum_exp, softmax, without_autocast
from .checks import check_dense, shape_of, shown
from .orders import accumulation_dtype


def merge_attention(outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of the same queries to all keys of several sets, from the attention to each.

    ``sum_p exp(lse_p - lse) output_p`` with ``lse = log(sum_p exp(lse_p))``: what one softmax over all keys gives, to
    rounding (Dao et al., "FlashAttention", arXiv 2205.14135, section 3.1). Its derivatives of every order are PyTorch's
    own, as far as those of its arguments go.

    Args:
        outputs: at least one, of one shape ``(..., head_dim)``, dtype and device: results of any attention function.
        lses: the log-sum-exp of each, ``(...)``: the second result with ``return_lse=True``. Minus infinity marks rows
            without any key, whose outputs do not count. (The attention that made such a row has no derivative there:
            its own backward gives NaN, as a softmax of nothing does, whatever comes down to it.)

    Returns:
        The output, shaped and typed like each, and its log-sum-exp. Half precision is merged in float32. A row without
        any key in all sets is NaN, and its log-sum-exp minus infinity.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message names it.
    """
    outputs, lses = _sequence("outputs", outputs), _sequence("lses", lses)
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"outputs and lses must have one length, of at least 1, got {len(outputs)} outputs and {len(lses)} lses"
        )
    _check_alike("outputs", outputs)
    first = outputs[0]
    if first.dim() == 0 or not first.dtype.is_floating_point:
        raise ValueError(
            f"outputs must be floating point, shaped (..., head_dim), got {first.dtype} of shape {shape_of(first)}"
        )
    _check_alike("lses", lses)
    wide = accumulation_dtype(first.dtype)
    if lses[0].shape != first.shape[:-1] or lses[0].dtype != wide or lses[0].device != first.device:
        raise ValueError(
            f"lses must have shape {shape_of(first)[:-1]}, {wide} and device {first.device} with these outputs,"
            f" got {shape_of(lses[0])}, {lses[0].dtype} and {lses[0].device}"
        )
    with without_autocast(first.device.type):
        parts = torch.stack(lses, -1)
        merged = 0
        for output, lse, weight in zip(outputs, lses, softmax(parts).unbind(-1), strict=True):
            counted = torch.where(lse.unsqueeze(-1) == -torch.inf, 0, output.to(wide))
            merged = merged + weight.unsqueeze(-1) * counted
        return merged.to(first.dtype), log_sum_exp(parts)


def _sequence(name: str, tensors: Any) -> Sequence[torch.Tensor]:
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {shown(tensors)}")
    for i, tensor in enumerate(tensors):
        check_dense(f"{name}[{i}]", tensor)
    return tensors


def _check_alike(name: str, tensors: Sequence[torch.Tensor]) -> None:
    first, *others = [(shape_of(tensor), tensor.dtype, tensor.device) for tensor in tensors]
    for i, other in enumerate(others, 1):
        if other != first:
            raise ValueError(
                f"{name}[{i}] must have the shape, dtype and device of {name}[0], {', '.join(map(str, first))},"
                f" got {', '.join(map(str, other))}"
            )
