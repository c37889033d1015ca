"""Instructions in the loops of Triton's kernels, without a GPU: what bounds them is how many are issued.

    python -m benchmarks.kernels.triton_instructions            # compiles the sample and prints the table of the docs
    python -m benchmarks.kernels.triton_instructions --update   # and writes it to benchmarks/results

For each kernel of the sample, in bfloat16 on sm_90: the instructions of its innermost loops with products, per pair of
a query and a key and per thread. A test compiles a few again and fails where one has grown by more than 5 percent.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import triton

from benchmarks.shapes import SHAPES

from . import pretended
from .triton_resources import Variant, variants

PATH = Path(__file__).parents[1] / "results" / "triton_instructions.csv"

ARCH, DTYPE = "sm_90", "bfloat16"
SAMPLE = ("nat-256", "church-g5")
KERNELS = ("forward", "backward_query", "backward_key", "table_shares", "double_query", "double_key")
GROWTH = 1.05

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:\S+,\s*)?`?\(?(?:0x)([0-9a-f]+)")
_PRODUCT = re.compile(r"\b(?:H|HG|QG|D|UTCH|UTCQ)MMA")

Counts = dict[tuple[str, str], str]
"""By kernel and shape: loops in order, "17.9" or "26.1 + 35.0"."""


def loops_of(sass: str) -> list[int]:
    """Instructions of the innermost loops that hold a product, in the order of the code."""
    code = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    loops = []
    for address, text in code:
        if (branch := _BRANCH.search(text)) and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    counts = []
    for first, last in sorted(set(loops)):
        inside = [text for address, text in code if first <= address <= last]
        holds_another = any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
        if not holds_another and any(map(_PRODUCT.search, inside)):
            counts.append(len(inside))
    return counts


def count(variant: Variant) -> str:
    """Of a kernel, compiled here."""
    triton.runtime.driver.set_active(pretended.Driver(variant.arch))
    compiled = variant.kernel.warmup(*variant.arguments, grid=(1,), **variant.options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    static = variant.options["S"]
    tile = math.prod((static.own_d, static.own_h, static.own_w, static.block_d, static.block_h, static.block_w))
    threads = 32 * variant.options["num_warps"]
    return " + ".join(f"{loop * threads / tile:.1f}" for loop in loops_of(sass))


def counted(shapes: Iterable[str] = SAMPLE, kernels: Iterable[str] = KERNELS) -> Counts:
    """Of the sample, or a part of it."""
    counts = {}
    for shape in shapes:
        for variant in variants([SHAPES[shape]], DTYPE, ARCH):
            if variant.name in kernels:
                name = variant.name
                if variant.options.get("SECOND_ORDER"):
                    name += ", double"
                counts[name, shape] = count(variant)
    return counts


def grown(counts: Counts, before: Counts) -> list[str]:
    """What has more than ``GROWTH`` times the instructions, or other loops."""
    found = []
    for kind, loops in counts.items():
        new, old = ([float(loop) for loop in text.split(" + ")] for text in (loops, before[kind]))
        if len(new) != len(old) or any(a > GROWTH * b for a, b in zip(new, old, strict=True)):
            found.append(f"{' of '.join(kind)}: {before[kind]} -> {loops}")
    return found


def read(path: Path = PATH) -> Counts:
    with path.open(newline="") as file:
        return {(row["kernel"], row["shape"]): row["instructions"] for row in csv.DictReader(file)}


def write(counts: Counts, path: Path = PATH) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("kernel", "shape", "instructions"))
        writer.writerows((*kind, loops) for kind, loops in counts.items())


def table(counts: Counts) -> str:
    """As in docs/triton.md."""
    shapes = list(dict.fromkeys(shape for _, shape in counts))
    lines = [f"| kernel | {' | '.join(shapes)} |", f"| --- |{' ---: |' * len(shapes)}"]
    for kernel in dict.fromkeys(kernel for kernel, _ in counts):
        lines.append(f"| `{kernel}` | {' | '.join(counts.get((kernel, shape), '') for shape in shapes)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"write {PATH.name}")
    options = parser.parse_args(arguments)
    counts = counted()
    print(table(counts))
    if options.update:
        write(counts)


if __name__ == "__main__":
    main()
