"""What the compiler made of the kernel variants that the named shapes use: a table that is part of the repository.

``python -m benchmarks.kernels.triton_resources --update`` fills it. It has one line per variant and architecture.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

PATH = Path(__file__).parents[1] / "results" / "triton_resources.csv"
"""In a checkout; the installed package does not need it."""

SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
"""Bytes of shared memory that one block of threads can have."""

MOST_REGISTERS = 255
"""That a thread can have."""

CHOSEN_SPILL = 16
"""Bytes per thread that count as a choice, see ``Usage.by_choice``."""


@dataclass(frozen=True)
class Usage:
    """One compiled kernel variant."""

    kernel: str
    arch: str
    dtype: str
    shape: str
    """The first of the named shapes that use it."""
    tile: str
    """Extents of tile and block; "streamed" where rows are loaded chunk by chunk."""
    warps: int
    stages: int
    registers: int
    spilled: int
    """Bytes of local memory per thread."""
    shared: int
    """Bytes of shared memory per block of threads."""
    seconds: float
    """Processor time to compile."""
    variant: str
    """Digest of what the kernel is compiled for: types, alignments, constants, configuration."""
    source: str
    """Digest of the kernel's code."""
    triton: str
    """Version of Triton that compiled it."""

    @property
    def by_choice(self) -> bool:
        """Whether the assembler spilled a few numbers, with registers to spare, so that one more block of threads fits
        a multiprocessor (it does so to end at 168, 128 or 96 registers)."""
        return 0 < self.spilled <= CHOSEN_SPILL and self.registers < MOST_REGISTERS

    @property
    def problem(self) -> str:
        """What is wrong; empty if nothing is."""
        if self.spilled and not self.by_choice:
            return f"spills {self.spilled} bytes per thread"
        if self.shared > SHARED_LIMIT[self.arch]:
            return f"needs {self.shared} bytes of shared memory of {SHARED_LIMIT[self.arch]}"
        return ""

    @property
    def resources(self) -> tuple[int, int, int]:
        return self.registers, self.spilled, self.shared


Table = dict[tuple[str, str], Usage]
"""By architecture and variant."""


def read(path: Path = PATH) -> Table:
    """The table; empty if there is no file."""
    if not path.exists():
        return {}
    types = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(Usage)}
    with path.open(newline="") as file:
        usages = [Usage(**{name: types[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]
    return {(usage.arch, usage.variant): usage for usage in usages}


def write(usages: Iterable[Usage], path: Path = PATH) -> None:
    """Sorted, and all or nothing: stopping the command loses no line."""
    names = [field.name for field in fields(Usage)]
    rows = [[getattr(usage, name) for name in names] for usage in usages]
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(sorted(rows, key=lambda row: (row[1], row[2], row[3], row[0], row)))
    os.replace(part, path)
