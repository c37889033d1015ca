"""Who is compared: our backends, plain PyTorch, and other attention libraries.

A candidate prepares a function ``(query, key, value, table) -> output`` for a shape; what depends on the shape
alone (index tensors, masks, compilation) is prepared once and is neither timed nor counted as memory. Where it
can't do the shape at all, ``prepare`` raises CannotError with the reason; what else it can't do shows when it is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import natten_ext
from natten_ext.backends.choice import TAKES

from . import naive, peers
from .problem import Attend, CannotError
from .shapes import Shape
from .suites import PEER_NAMES

Prepare = Callable[[Shape, torch.device, torch.dtype], Attend]


@dataclass(frozen=True)
class Candidate:
    """``group`` is "ours", "naive" or "peer".

    ``drops_table``: compared on the same shape without its table. ``compiles``: at its first call on a shape.
    """

    name: str
    group: str
    prepare: Prepare
    drops_table: bool = False
    compiles: bool = False

    def covers(self, shape: Shape) -> bool:
        """Whether to list this candidate for a shape: not a second form of naive where there is only one."""
        return self.group != "naive" or naive.covers(self.name, shape)


def ours(backend: str) -> Prepare:
    """natten_ext's public functions on one backend."""

    def prepare(shape: Shape, device: torch.device, dtype: torch.dtype) -> Attend:
        if shape.kind not in TAKES[backend]:
            raise CannotError(f"takes only {', '.join(TAKES[backend])}")
        choices = {"score": shape.score, "backend": backend}
        if shape.kind == "full":
            return lambda q, k, v, table: natten_ext.attention(q, k, v, **choices)
        if shape.kind == "grid":
            return lambda q, k, v, table: natten_ext.grid_attention(
                q, k, v, shape.window, shift=shape.shift, bias=table, **choices
            )
        windows = {"dilation": list(shape.dilations), "stride": shape.stride, "is_causal": shape.causal}
        return lambda q, k, v, table: natten_ext.neighborhood_attention(
            q, k, v, shape.window, bias=table, **windows, **choices
        )

    return prepare


def all_candidates(device_type: str) -> list[Candidate]:
    """Ours first, then naive, then the peers; whether they can run here shows when they are prepared."""
    statuses = natten_ext.list_backends(device=device_type)
    fused = [status.name for status in statuses if status.name != "reference"]
    return [
        *(Candidate(name, "ours", ours(name)) for name in fused),
        Candidate("naive", "naive", ours("reference")),
        *(Candidate(name, "naive", prepare) for name, prepare in naive.VARIANTS.items()),
        *(Candidate(name, "peer", prepare) for name, prepare in peers.sdpa_kernels(device_type).items()),
        Candidate("flex", "peer", peers.prepare_flex, compiles=True),
        *(
            Candidate(name, "peer", prepare, drops_table=True, compiles=name == "natten-flex")
            for name, prepare in peers.natten_kernels(device_type).items()
        ),
    ]


def find_candidates(
    device: torch.device,
    dtype: torch.dtype,
    backends: list[str] | None = None,
    peer_names: tuple[str, ...] = PEER_NAMES,
) -> list[Candidate]:
    """The candidates asked for; ``backends`` None means every backend that is available for the device and dtype.

    Raises ValueError for an unknown backend or peer.
    """
    statuses = {status.name: status for status in natten_ext.list_backends(device=device, dtype=dtype)}
    for name in peer_names:
        if name not in PEER_NAMES:
            raise ValueError(f"--peers must be among {', '.join(PEER_NAMES)}, got {name!r}")
    for name in backends or ():
        if name not in statuses:
            raise ValueError(f"--backend must be among {', '.join(statuses)}, got {name!r}")
    if backends is None:
        backends = [name for name, status in statuses.items() if status.available]
    return [
        candidate
        for candidate in all_candidates(device.type)
        if candidate.name in backends or candidate.name.split("-")[0] in peer_names
    ]
