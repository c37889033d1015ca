"""Which fused backend is the fastest on a GPU, as measured: the table behind ``backend="auto"``.

``preferences.json`` holds one entry per class of problems that was measured, written by hand from the results of
``python -m benchmarks.gpu_check`` (benchmarks/results): ``capability`` ("9.0"), ``neighborhood`` ("full", "grid" or
"neighborhood"), ``dtype`` ("bfloat16"), ``head_dim`` (the largest of the class), ``fastest`` (backends, fastest
first), and ``results``, the file the entry comes from. Classes that nobody measured take the default order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .support import asked_once

DEFAULT_ORDER = ("cuda", "triton")
"""Of what is not measured."""

PATH = str(Path(__file__).parent / "preferences.json")


@dataclass(frozen=True)
class Preference:
    """One measured class of problems; see the module."""

    capability: str
    neighborhood: str
    dtype: str
    head_dim: int
    fastest: tuple[str, ...]
    results: str


def read(path: str = PATH) -> tuple[Preference, ...]:
    """The entries of a table, narrow classes first. Raises ValueError for one that makes no sense."""
    entries = []
    for entry in json.loads(Path(path).read_text())["measured"]:
        preference = Preference(**entry | {"fastest": tuple(entry["fastest"])})
        if sorted(preference.fastest) != sorted(DEFAULT_ORDER):
            raise ValueError(f"{Path(path).name}: fastest must order {DEFAULT_ORDER}, got {preference.fastest}")
        entries.append(preference)
    return tuple(sorted(entries, key=lambda preference: preference.head_dim))


@asked_once
def classes(
    capability: str, neighborhood: str, dtype: str, path: str = PATH
) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """``(largest head_dim, backends)`` of the measured classes, narrow ones first."""
    wanted = capability, neighborhood, dtype
    return tuple((p.head_dim, p.fastest) for p in read(path) if (p.capability, p.neighborhood, p.dtype) == wanted)


def order(capability: str, neighborhood: str, dtype: str, head_dim: int, path: str = PATH) -> tuple[str, ...]:
    """GPU backends for a problem, the fastest first."""
    for largest, fastest in classes(capability, neighborhood, dtype, path):
        if head_dim <= largest:
            return fastest
    return DEFAULT_ORDER
