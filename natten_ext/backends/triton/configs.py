"""Tile sizes, warps and pipeline stages of every kernel, from a small table (configs.json).

A section per architecture ("sm_90", written by ``python -m benchmarks.kernels.triton_tune``) goes before "default",
which suits every NVIDIA GPU: no spilled registers and at most 99 KiB of shared memory for sm_80 to sm_100.
A key is ``step/shape class/dtype/channels``, or ``step/dtype/channels`` for all shape classes.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

PATH = Path(__file__).with_name("configs.json")
CHANNELS = (16, 32, 64, 128, 256)
STEPS = ("forward", "backward_query", "backward_key", "double_query", "double_key", "table", "double_table")

# How float32 is multiplied in full precision: on tensor cores, as sums of bfloat16 (24 bits in all).
FLOAT32_PRECISION = "bf16x6"


class Config(NamedTuple):
    """Positions of a program's own tile and of the blocks it walks over, warps, pipeline stages, and the channels that
    are loaded at a time where whole rows do not fit the registers (see ``tiles``); 0 for whole rows."""

    own: int
    block: int
    warps: int
    stages: int
    chunk: int = 0


ROWS_PER_WARP = 16
FEWEST_ROWS = 64
"""Tiles with fewer are not multiplied with Hopper's warp-group instructions, and several warps may share a row."""


def fitted(config: Config, rows: int) -> Config:
    """The configuration of a tile with this many rows, which are fewer than ``own`` where a problem is small.

    For 64 rows and 8 warps Triton 3.6 takes a layout of products on sm_90 that covers 128 rows, and reads the second
    half from beyond the tile: garbage, or an illegal address. Elsewhere half of the warps would repeat the other half.
    """
    if rows < FEWEST_ROWS:
        return config
    return config._replace(warps=min(config.warps, rows // ROWS_PER_WARP))


@functools.cache
def pipelines(section: str) -> bool:
    """Whether the compiler overlaps iterations of loops correctly on an architecture.

    Before 3.8 it may not for compute capability 10.x: of two products that are added to one sum, as in the double
    backward, the first may start before the second of the iteration before is there (triton-lang/triton#10821, #10988).
    """
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return not section.startswith("sm_10") or version >= (3, 8)


# Every operation costs the same there, however large.
INTERPRETER = Config(128, 64, 1, 1)


class State(NamedTuple):
    """What decides a configuration besides the problem and the device."""

    assumed: str = "default"
    forced: Config | None = None
    step: str = ""
    """Of what ``forced`` is for; empty: of every step."""
    table: int = 0
    """How often ``write`` has changed it."""


state = State()


def precision(dtype: torch.dtype, full: bool) -> str:
    """Triton's input precision of products."""
    if dtype != torch.float32:
        return "ieee"
    return FLOAT32_PRECISION if full else "tf32"


def dtype_class(dtype: torch.dtype, full: bool) -> str:
    """ "half", "tf32", "float32" or "float64"."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "tf32" if not full else str(dtype).removeprefix("torch.")


def channel_class(head_dim: int) -> int:
    return next(width for width in CHANNELS if head_dim <= width)


def architecture(device: torch.device) -> str:
    """Name of a device's section, for example "sm_90"."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if device.type != "cuda":
        return state.assumed
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@contextlib.contextmanager
def _with(**changes: Any) -> Iterator[None]:
    global state
    previous, state = state, state._replace(**changes)
    try:
        yield
    finally:
        state = previous._replace(table=state.table)


def assumed_architecture(name: str) -> contextlib.AbstractContextManager[None]:
    """Which architecture tensors that are not on a GPU stand for (to compile ahead of time)."""
    return _with(assumed=name)


def forced(config: Config, step: str = "") -> contextlib.AbstractContextManager[None]:
    """Use one configuration for everything, or for one step (to tune, and in tests)."""
    return _with(forced=config, step=step)


def lookup(device: torch.device, step: str, shape_class: str, dtype: torch.dtype, full: bool, head_dim: int) -> Config:
    """The configuration of a step."""
    section = architecture(device)
    if state.forced and state.step in ("", step):
        config = state.forced
    else:
        config = _lookup(section, step, shape_class, dtype_class(dtype, full), channel_class(head_dim))
    return config if pipelines(section) else config._replace(stages=1)


@functools.lru_cache(maxsize=4096)
def _lookup(section: str, step: str, shape_class: str, dtype: str, channels: int) -> Config:
    if section == "interpreter":
        return INTERPRETER._replace(chunk=64 if channels == 256 else 0)
    table = read()
    for entries in (table.get(section, {}), table["default"]):
        for key in (f"{step}/{shape_class}/{dtype}/{channels}", f"{step}/{dtype}/{channels}"):
            if key in entries:
                return Config(*entries[key])
    raise RuntimeError(f"{PATH} has no configuration for {step}/{dtype}/{channels}")


def read(path: Path = PATH) -> dict[str, dict[str, list]]:
    return json.loads(path.read_text())


def write(table: dict[str, dict[str, list]], path: Path = PATH) -> None:
    """One line per entry, sorted."""
    sections = []
    for section, entries in table.items():
        lines = [f"    {json.dumps(key)}: {json.dumps(list(entries[key]))}" for key in sorted(entries)]
        sections.append(f"  {json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n  }")
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n")
    global state
    _lookup.cache_clear()
    state = state._replace(table=state.table + 1)
