"""Numbers that kernels read and that no call changes: kept on the device, for the next call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

Lists = tuple[Sequence[Any], ...]
"""Integers, or rows of integers, of several tensors."""


def capturing(on_gpu: bool) -> bool:
    """Whether a CUDA graph is captured."""
    return on_gpu and torch.cuda.is_current_stream_capturing()


def made_on(device: torch.device, lists: Lists) -> tuple[torch.Tensor, ...]:
    """Integers on a device, to keep; RuntimeError while a CUDA graph is captured, which may copy nothing to a device.

    Made in a thread of its own. torch.compile(mode="reduce-overhead") has what the calling thread allocates while it
    warms up in the memory of a CUDA graph, where nothing may be kept: it raises an error if something is.
    """
    if capturing(device.type == "cuda"):
        raise RuntimeError(
            "backend 'triton' meets this problem for the first time while a CUDA graph is captured; run it once before"
            " the capture"
        )
    with ThreadPoolExecutor(1) as thread:
        made = [thread.submit(torch.tensor, numbers, dtype=torch.int32, device=device) for numbers in lists]
        return tuple(tensor.result() for tensor in made)


@functools.lru_cache(maxsize=256)
def kept_on(device: torch.device, make: Callable[..., Lists], *arguments: Any) -> tuple[torch.Tensor, ...]:
    """``make(*arguments)`` on a device."""
    return made_on(device, make(*arguments))


_captured: dict[int, tuple[torch.Tensor, ...]] = {}


def keep_for_good(tensors: tuple[torch.Tensor, ...]) -> None:
    """Never free what a captured graph reads."""
    _captured[id(tensors)] = tensors
