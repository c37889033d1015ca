"""Which shapes each suite runs, and how suite ``cpu`` scales them.

``cpu`` keeps head_dim, window or kernel, score and table of the named shape and shrinks only how much there is of
it: the batch, the heads, or the map (dilations shrink with the map, so that neighborhoods cover the same share of
it). Each is sized so that plain PyTorch's double backward stays below about 6 GB and a few seconds on two cores,
and that one tensor holds at least two megabytes, so that a memory measurement means something. ``general`` shrinks
windows and strides with the map as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .shapes import GENERAL, NAMED, SHAPES, Shape

_CPU: dict[str, dict[str, Any]] = {
    "nat-16": {"batch": 4},
    "nat-32": {"batch": 1},
    "nat-64": {"batch": 1, "heads": 4},
    "nat-256": {"batch": 1, "size": (96, 96), "dilations": (1, 12)},
    "nat-512": {"batch": 1, "size": (128, 128), "dilations": (1, 16)},
    "cifar-g2": {"batch": 16},
    "church-g5": {"batch": 1},
    "church-g6": {"batch": 1},
    "cifar-d1": {"batch": 16},
    "church-d2": {"batch": 2},
    "celeba-d1": {"batch": 1},
    "vitgan-d": {"batch": 32},
    "l2-1k": {"batch": 4},
    "full-1k": {"batch": 4},
}

_GENERAL: dict[str, dict[str, Any]] = {
    "allin1": {},
    "mimi": {"heads": 2},
    "gpt-oss": {"size": (2048,), "heads": 2},
    "flux-gna": {"size": (32, 32), "heads": 4, "window": 10, "stride": 2},
    "swin-t1": {"batch": 8},
    "hunyuan-na": {"size": (8, 12, 20), "heads": 1, "window": (5, 6, 6)},
    "hunyuan-gna": {"size": (8, 12, 20), "heads": 1, "window": (5, 6, 6), "stride": (4, 2, 2)},
    "video-swin-t1": {"batch": 1, "size": (16, 28, 28)},
}

_SMOKE: dict[str, dict[str, Any]] = {
    "nat-16": {"batch": 1, "heads": 2, "head_dim": 8},
    "cifar-d2": {"batch": 1, "heads": 2, "head_dim": 12},
    "celeba-d1": {"batch": 1, "size": (8, 8), "heads": 2},
    "vitgan-d": {"batch": 2, "heads": 2, "head_dim": 16},
    "cross-256": {"batch": 1, "heads": 2, "head_dim": 16},
}

SUITES: dict[str, list[Shape]] = {
    "cpu": [replace(SHAPES[name], **changes) for name, changes in _CPU.items()],
    "general": [replace(GENERAL[name], **changes) for name, changes in _GENERAL.items()],
    "gpu": list(SHAPES.values()),
    "smoke": [replace(SHAPES[name], **changes) for name, changes in _SMOKE.items()],
}

PEER_NAMES = ("naive", "sdpa", "flex", "natten")  # beside ours; see candidates

DEFAULT_DTYPE = {"cpu": "float32", "general": "float32", "gpu": "bfloat16", "smoke": "float32"}


def how_scaled(shape: Shape) -> str:
    """What differs from the named shape at its training batch, for example "batch 16 -> 1, map 256 -> 128"."""
    true = NAMED[shape.name]
    changes = [
        f"{label} {before} -> {after}"
        for label, before, after in (
            ("batch", true.batch, shape.batch),
            ("map" if shape.is_map else "tokens", _extents(true.size), _extents(shape.size)),
            ("heads", true.heads, shape.heads),
            ("head_dim", true.head_dim, shape.head_dim),
            ("window", _extents(true.kernel), _extents(shape.kernel)),
            ("stride", true.stride, shape.stride),
            ("dilations", true.dilations, shape.dilations),
        )
        if before != after
    ]
    return ", ".join(changes) or "as it is"


def _extents(extents: tuple[int, ...]) -> str:
    """One number where all are the same."""
    return "x".join(map(str, extents[:1] if len(set(extents)) == 1 else extents))
