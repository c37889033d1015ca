"""The ``cpu`` backend: C++ kernels (csrc/cpu), vectorised for AVX2 or AVX-512, whichever the machine has."""

from __future__ import annotations

from pathlib import Path

import torch

from .support import COMPILED, NOT_COMPILED, REBUILD, cannot_take, load

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_library = Path(__file__).parents[1] / "libnatten_ext_cpu.so"
if COMPILED and not _library.exists():
    raise ImportError(
        f"natten_ext is not built: {_library} is missing. {REBUILD} builds it; after an installation without -e, run"
        " Python outside the checkout, which hides what is installed."
    )
if COMPILED and (_wrong := load(_library, torch.ops.natten_ext_cpu)):
    raise ImportError(_wrong)

run = None  # csrc/cpu/library.cpp registers the kernels


def cannot_run(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why this backend can't run a problem; empty if it can."""
    if not COMPILED:
        return NOT_COMPILED
    if device.type not in ("cpu", "meta"):
        return f"device must be cpu, got {device.type}"
    return cannot_take(dtype, DTYPES, head_dim)


def instruction_set() -> str:
    """The variant of the kernels that this machine runs: "avx512", "avx2" or "baseline"."""
    return torch.ops.natten_ext_cpu.instruction_set()


def build_information() -> dict[str, str]:
    """What the library was made of: ``version``, ``compiler``, ``torch`` and ``instruction_sets``."""
    names = ("version", "compiler", "torch", "instruction_sets")
    return {name: torch.ops.natten_ext_cpu.build_information(name) for name in names}


def release_working_memory() -> None:
    """Give back the working memory that the kernels keep for their next calls (at most 16 MiB per thread)."""
    torch.ops.natten_ext_cpu.release_working_memory()
