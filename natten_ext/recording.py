"""Records of attention calls: what a model asks for, and which backend each call takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .geometry import AnyNeighborhood


@dataclass(frozen=True)
class AttentionCall:
    """One call of a public attention function, as it is carried out: autocast's dtype, the resolved scale."""

    backend: str
    """The backend that runs it, one of the names in ``natten_ext.list_backends()``."""
    neighborhood: str
    """"full", "grid" or "neighborhood"."""
    keys: int
    """How many keys a query sees; the most, where heads differ."""
    query_shape: tuple[int, ...]
    """``(batch, tokens, heads, head_dim)`` or ``(batch, height, width, heads, head_dim)``."""
    key_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    score: str
    """"dot" or "l2"."""
    scale: float
    bias: bool
    """Whether there is a relative position table."""


_lists: list[list[AttentionCall]] = []  # of the open `record_calls`; replaced, never changed in place


@contextmanager
def record_calls() -> Iterator[list[AttentionCall]]:
    """Inside, every call of a public attention function, by functions, modules or ``na2d``, adds a record to the list.

    For the whole process, all threads; blocks nest. The list stays readable afterwards. Calls on fake and meta tensors
    and calls that checkpointing repeats count like others; calls inside ``torch.compile`` do not, since no Python runs
    there. ::

        with natten_ext.record_calls() as calls:
            model(x)
        print({call.backend for call in calls})
    """
    global _lists
    calls: list[AttentionCall] = []
    _lists = [*_lists, calls]
    try:
        yield calls
    finally:
        _lists = [other for other in _lists if other is not calls]


def record(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    neighborhood: AnyNeighborhood,
    score: str,
    scale: float,
) -> None:
    """Add a call to the lists of the open ``record_calls``."""
    if torch.compiler.is_compiling() or not _lists:
        return
    call = AttentionCall(
        backend=backend,
        neighborhood=neighborhood.kind,
        keys=neighborhood.keys(key.shape[1:-2].numel()),
        query_shape=tuple(query.shape),
        key_shape=tuple(key.shape),
        dtype=query.dtype,
        device=query.device,
        score=score,
        scale=scale,
        bias=bias is not None,
    )
    for calls in _lists:
        calls.append(call)
