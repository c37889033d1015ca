"""``python -m benchmarks.kernels.cuda_resources``: what every compiled CUDA kernel takes of a multiprocessor.

ptxas reports registers, stack and spills when the kernels are compiled; the report is kept beside the library. Dynamic
shared memory is chosen at launch (csrc/cuda/launch.h), for the problem at hand: the table gives what a block may have
at the occupancy that the registers allow.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import natten_ext
from natten_ext.backends import cuda

REPORT = (cuda.library_folder() or Path(natten_ext.__file__).parent) / "cuda_resources.txt"

# Of a block, at most: kThreads of csrc/cuda/kernel.h, which most of narrow windows' double backward has too; of their
# others NarrowTile's. Kernels for grids and short sequences say their own.
THREADS, NARROW_THREADS = 128, 256

_REGISTERS = 65536  # of a multiprocessor, since 3.5
_MODES = {"4Half": "float16", "6Bfloat": "bfloat16", "ffLi1": "float32 (tf32)", "ffLi3": "float32", "ddLi0": "float64"}
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)a?'")
_KERNEL = re.compile(r"attention_kernelI.*?4ModeI(.*?)EE?NS0_\d+(\w+?)ELi(\d+)ELb([01])E")
_NARROW = re.compile(r"(?:narrow|short)_kernelINS0_\d+(\w+?)INS0_4ModeI(.*?)EELi(\d+)E(?:Lb([01])E)?")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one compute capability; sizes in bytes."""

    name: str
    dtype: str
    head_dim: int
    capability: str
    registers: int
    stack: int
    spills: int

    @property
    def warps(self) -> int:
        """Of a block, at most."""
        if self.name.startswith("Short"):
            return 5
        if self.name.startswith("Grid"):
            if self.name == "GridForward":
                return 4 if self.head_dim <= 32 else 8 if self.head_dim <= 64 else 16
            return 4 if (self.name, self.head_dim) == ("GridBackward", 8) else 8
        small = self.name.startswith("NarrowDouble") and (self.name, self.head_dim) != ("NarrowDoubleBackwardKey", 32)
        return (NARROW_THREADS if self.name.startswith("Narrow") and not small else THREADS) // 32

    @property
    def blocks(self) -> int:
        """Blocks on a multiprocessor, as far as registers go."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(_REGISTERS // per_warp, warps_of(self.capability)) // self.warps

    @property
    def occupancy(self) -> float:
        return self.blocks * self.warps / warps_of(self.capability)

    @property
    def shared(self) -> int:
        """Shared memory of a block when that many are on a multiprocessor; each loses 1 KiB to the system."""
        return shared_of(self.capability) // max(self.blocks, 1) - 1024


def warps_of(capability: str) -> int:
    """Warps that a multiprocessor holds."""
    return 64 if capability in ("8.0", "9.0", "10.0", "10.3") else 48


def shared_of(capability: str) -> int:
    """Bytes of shared memory of a multiprocessor."""
    kib = {"8.0": 164, "8.7": 164, "9.0": 228, "10.0": 228, "10.3": 228, "11.0": 228}.get(capability, 100)
    return kib * 1024


def parse(lines: Iterable[str]) -> Iterator[Kernel]:
    """The attention kernels in a report of ptxas (``-Xptxas=-v``)."""
    kernel = capability = stack = None
    for line in lines:
        if match := _ENTRY.search(line):
            kernel, number = _kernel_of(match[1]), match[2]
            capability = f"{number[:-1]}.{number[-1]}"
        elif match := _STACK.search(line):
            stack = match
        elif (match := _USED.search(line)) and kernel and stack:
            mode, name, head_dim = kernel
            dtype = next(dtype for key, dtype in _MODES.items() if key in mode)
            spills = int(stack[2]) + int(stack[3])
            yield Kernel(name, dtype, int(head_dim), capability, int(match[1]), int(stack[1]), spills)


def _kernel_of(entry: str) -> tuple[str, str, str] | None:
    """Mode, name and head_dim of an attention kernel.

    Names of those for general neighborhoods begin with "General"; of those for whole classes (csrc/cuda/narrow.h), they
    end in "Whole".
    """
    if match := _KERNEL.search(entry):
        return match[1], ("General" if match[4] == "1" else "") + match[2], match[3]
    if match := _NARROW.search(entry):
        return match[2], match[1] + ("Whole" if match[4] == "1" else ""), match[3]
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.cuda_resources", description=__doc__.split("\n")[0]
    )
    parser.add_argument("report", nargs="?", type=Path, default=REPORT, help="output of nvcc -Xptxas=-v")
    parser.add_argument("--capability", help='only this compute capability, as "9.0"')
    parser.add_argument("--csv", action="store_true", help="separated by commas, as in benchmarks/results")
    options = parser.parse_args(arguments)
    if not options.report.exists():
        print(f"{options.report} is missing: natten_ext was built without CUDA kernels", file=sys.stderr)
        return 1
    kernels = [k for k in parse(options.report.read_text().splitlines()) if options.capability in (None, k.capability)]
    heading = ("kernel", "dtype", "head_dim", "sm", "registers", "stack", "spills", "blocks", "occupancy", "shared KiB")
    rows = [
        (k.name, k.dtype, k.head_dim, k.capability, k.registers, k.stack, k.spills, k.blocks, f"{k.occupancy:.0%}",
         f"{k.shared / 1024:.0f}")
        for k in sorted(kernels, key=lambda k: (k.capability, k.name, k.dtype, k.head_dim))
    ]  # fmt: skip
    if options.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([heading, *rows])
        return 0
    widths = [max(len(str(row[i])) for row in [heading, *rows]) for i in range(len(heading))]
    for row in [heading, *rows]:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
