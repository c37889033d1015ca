"""What the compiler makes of the kernels, without a GPU: registers, spills, shared memory, compile time.

    python -m natten_ext.triton.resources --arch sm_90 --shapes nat-256 cifar-d1 --dtypes bfloat16

compiles every kernel variant that the shapes use (``benchmarks/shapes.py``, so run it in a checkout) ahead of time
and prints one line for each. It ends with status 1 if a kernel spills registers or needs more shared memory than the
architecture has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from . import configs
from .launch import INTERPRETED, recorded_launches
from .named import DTYPES, ORDERS, named_shapes, run_orders, torch_dtype
from .tiles import Rows

SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
"""Bytes of shared memory that one block of threads can have."""


@dataclass(frozen=True)
class Usage:
    """One compiled kernel variant."""

    kernel: str
    arch: str
    shape: str
    dtype: str
    tile: str
    warps: int
    stages: int
    registers: int
    spilled: int
    """Bytes of local memory per thread."""
    shared: int
    """Bytes of shared memory per block of threads."""
    seconds: float
    """Time to compile."""

    @property
    def problem(self) -> str:
        """What is wrong; empty if nothing is."""
        if self.spilled:
            return f"spills {self.spilled} bytes per thread"
        if self.shared > SHARED_LIMIT[self.arch]:
            return f"needs {self.shared} bytes of shared memory of {SHARED_LIMIT[self.arch]}"
        return ""


class _CompileOnly:
    """A Triton driver for a GPU that is not there."""

    def __init__(self, arch: str) -> None:
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.target.arch

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def _signature(arguments: Iterable[Any]) -> tuple:
    """What Triton compiles separately for: types, and strides that are 1 or multiples of 16."""
    parts: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Rows):
            strides = tuple((s == 1, s % 16 == 0, s > 2**31 - 1) for s in argument[1:])
            parts.append((argument.pointer.dtype, strides))
        else:
            parts.append(argument.dtype if isinstance(argument, torch.Tensor) else argument is None)
    return tuple(parts)


def variants(shapes: Iterable[Any], dtypes: Iterable[str], arch: str, orders: Iterable[str]) -> Iterator[tuple]:
    """(shape, dtype, kernel, arguments, options) of every different kernel that the shapes launch."""
    seen = set()
    for name in dtypes:
        dtype = torch_dtype(name)
        for shape in shapes:
            found: list[tuple] = []
            with recorded_launches(lambda *launch: found.append(launch)), configs.assumed_architecture(arch):  # noqa: B023
                run_orders(shape, dtype, "meta", orders)
            for kernel, _, arguments, options in found:
                key = kernel.fn.__name__, _signature(arguments), tuple(sorted(options.items(), key=str))
                if key not in seen:
                    seen.add(key)
                    yield shape.name, name, kernel, arguments, options


def compile_variant(shape: str, dtype: str, arch: str, kernel: Any, arguments: tuple, options: dict) -> Usage:
    """Compile one variant for an architecture and read its resources from the result."""
    triton.runtime.driver.set_active(_CompileOnly(arch))
    triton.knobs.compilation.always_compile = True  # a cached result has no compile time
    start = time.perf_counter()
    compiled = kernel.warmup(*arguments, grid=(1,), **options)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    static = options.get("S")
    tile = (
        f"{static.own_h}x{static.own_w}|{static.block_h}x{static.block_w}{' streamed' if static.streamed else ''}"
        if static
        else ""
    )
    return Usage(
        kernel.fn.__name__.removesuffix("_kernel"), arch, shape, dtype, tile, options["num_warps"],
        options["num_stages"], usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared,
        round(seconds, 2),
    )  # fmt: skip


def _compile_share(job: tuple) -> list[Usage]:
    shapes, dtypes, arch, orders, kernels, share, shares, verbose = job
    results = []
    chosen = [v for v in variants(shapes, dtypes, arch, orders) if not kernels or v[2].fn.__name__[:-7] in kernels]
    for shape, dtype, kernel, arguments, options in chosen[share::shares]:
        results.append(compile_variant(shape, dtype, arch, kernel, arguments, options))
        if verbose:
            print(line_of(results[-1]), flush=True)
    return results


def usages(
    shapes: Iterable[Any], dtypes: Iterable[str], archs: Iterable[str], orders: Iterable[str] = ORDERS,
    kernels: Iterable[str] = (), processes: int = 1, verbose: bool = False,
) -> list[Usage]:  # fmt: skip
    """Compile all variants that ``shapes`` use, in several processes."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: nothing can be compiled in this process")
    jobs = [
        (list(shapes), list(dtypes), arch, list(orders), list(kernels), share, processes, verbose)
        for arch in archs
        for share in range(processes)
    ]
    if processes == 1:
        return [usage for job in jobs for usage in _compile_share(job)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return [usage for part in pool.map(_compile_share, jobs) for usage in part]


HEADER = "kernel          arch    shape            dtype     tile|block        warps stages  regs spills  shared   s"


def line_of(usage: Usage) -> str:
    return (
        f"{usage.kernel:15} {usage.arch:7} {usage.shape:16} {usage.dtype:9} {usage.tile:18} {usage.warps:4}"
        f" {usage.stages:6} {usage.registers:5} {usage.spilled:6} {usage.shared:7} {usage.seconds:5.1f}"
        f" {usage.problem and 'FAILS: ' + usage.problem}"
    )


def main(arguments: list[str] | None = None) -> int:
    named = named_shapes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"], choices=SHARED_LIMIT)
    parser.add_argument("--shapes", nargs="+", default=list(named), choices=named, metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "tf32", "float32"], choices=DTYPES)
    parser.add_argument("--orders", nargs="+", default=ORDERS, choices=ORDERS)
    parser.add_argument("--kernels", nargs="+", default=(), metavar="NAME", help="only these, as in the first column")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    options = parser.parse_args(arguments)
    print(HEADER, flush=True)
    shapes = [named[name] for name in options.shapes]
    table = usages(
        shapes, options.dtypes, options.arch, options.orders, options.kernels, options.processes, verbose=True
    )
    failing = [usage for usage in table if usage.problem]
    seconds = sorted(usage.seconds for usage in table)
    if seconds:
        print(f"{len(table)} variants, {len(failing)} fail; compiling took {seconds[len(seconds) // 2]} s (median)")
    if options.json:
        options.json.write_text(json.dumps([asdict(usage) for usage in table], indent=1) + "\n")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
