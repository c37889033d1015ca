"""What the compiler makes of the kernels, without a GPU: registers, spills, shared memory, compile time.

    python -m benchmarks.kernels.triton_resources --arch sm_90 --shapes nat-256 cifar-d1 --dtypes bfloat16

compiles every kernel variant that the shapes use (``benchmarks/shapes.py``) ahead of time
and prints one line for each. It ends with status 1 if a kernel spills registers for want of them or needs more shared
memory than the architecture has. With ``--update`` it compiles only what the table of all variants
(``triton_usage.py``) lacks or has from other code, and writes that to the table as it goes; it may be stopped and
started again. With ``--status`` it compiles nothing, and ends with status 1 if the table lacks a variant or has one
that fails.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITCallable

from benchmarks.record import output_file
from benchmarks.shapes import SHAPES
from natten_ext.backends.triton import configs
from natten_ext.backends.triton.launch import INTERPRETED
from natten_ext.backends.triton.tiles import Rows

from . import pretended, triton_usage
from .triton_problems import DTYPES, ORDERS, planned_orders, torch_dtype
from .triton_usage import SHARED_LIMIT, Table, Usage

ARCHS = ("sm_90", "sm_80", "sm_100")
TABLE_DTYPES = ("bfloat16",)
"""What the table of all variants holds."""

UNSAVED = 8
"""Compiled variants that a stopped ``--update`` may lose."""


@dataclass(frozen=True)
class Variant:
    """A kernel and what it is compiled for."""

    arch: str
    dtype: str
    shape: str
    kernel: Any
    arguments: tuple
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")

    @property
    def digest(self) -> str:
        return _digest(self.name, _signature(self.arguments), sorted(self.options.items()))

    @property
    def tile(self) -> str:
        if "S" not in self.options:
            return ""
        static = self.options["S"]
        streamed = " streamed" if static.streamed else ""
        own, block = (static.own_d, static.own_h, static.own_w), (static.block_d, static.block_h, static.block_w)
        tile, block = ("x".join(map(str, extents if static.deep else extents[1:])) for extents in (own, block))
        return f"{tile}|{block}{streamed}"


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


def _signature(arguments: Iterable[Any]) -> tuple:
    """What Triton compiles separately for: types, and strides that are 1 or multiples of 16."""
    parts: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Rows):
            strides = tuple((s == 1, s % 16 == 0, s > 2**31 - 1) for s in argument[1:] if s != ())
            parts.append((argument.pointer.dtype, strides))
        elif isinstance(argument, tuple):
            parts.append(_signature(argument))
        else:
            parts.append(argument.dtype if isinstance(argument, torch.Tensor) else argument is None)
    return tuple(parts)


@functools.cache  # hundreds of variants share a few kernels
def source_digest(kernel: Any) -> str:
    """Of the code of a kernel and all that it calls, without comments and documentation."""
    code: dict[str, str] = {}
    todo = [kernel]
    while todo:
        function = todo.pop()
        name = f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__qualname__}"
        if name in code:
            continue
        tree = ast.parse(function.src).body[0]
        if ast.get_docstring(tree) is not None:
            del tree.body[0]
        used = {node.id: function.fn.__globals__.get(node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)}
        constants = {key: value.value for key, value in sorted(used.items()) if isinstance(value, tl.constexpr)}
        code[name] = ast.dump(tree) + repr(constants)
        todo += [value for value in used.values() if isinstance(value, JITCallable)]
    return _digest(sorted(code.items()))


def variants(shapes: Iterable[Any], dtype_name: str, arch: str, orders: Iterable[str] = ORDERS) -> list[Variant]:
    """Every different kernel that the shapes launch."""
    dtype = torch_dtype(dtype_name)
    found: dict[str, Variant] = {}
    with configs.assumed_architecture(arch):
        for shape in shapes:
            for launch in planned_orders(shape, dtype, orders):
                for kernel, _, arguments, options in launch.launches:
                    variant = Variant(arch, dtype_name, shape.name, kernel, arguments, options)
                    found.setdefault(variant.digest, variant)
    return list(found.values())


def layouts_beyond(ttgir: str) -> list[str]:
    """Products of Hopper's warp groups whose layout covers more than their result (see ``configs.fitted``)."""
    layouts = {}
    for name, text in re.findall(r"^(#\w+) = #ttg\.nvidia_mma<\{versionMajor = 3,(.*)\}>", ttgir, re.MULTILINE):
        warps, instruction = (
            [int(number) for number in re.search(rf"{key} = \[([\d, ]+)\]", text)[1].split(",")]
            for key in ("warpsPerCTA", "instrShape")
        )
        layouts[name] = warps[0] * instruction[0], warps[1] * instruction[1]
    products = set(re.findall(r"warp_group_dot .*-> tensor<(\d+)x(\d+)x\w+, (#\w+)>", ttgir))
    return sorted(
        f"{layouts[name][0]}x{layouts[name][1]} for {rows}x{columns}"
        for rows, columns, name in products
        if layouts[name][0] > int(rows) or layouts[name][1] > int(columns)
    )


def compile_variant(variant: Variant) -> Usage:
    """Compile one variant for an architecture and read its resources from the result.

    A kernel that would read beyond its tiles is an error.
    """
    triton.runtime.driver.set_active(pretended.Driver(variant.arch))
    triton.knobs.compilation.always_compile = True  # a cached result has no compile time
    start = sum(os.times()[:4])
    compiled = variant.kernel.warmup(*variant.arguments, grid=(1,), **variant.options)
    seconds = sum(os.times()[:4]) - start
    beyond = layouts_beyond(compiled.asm["ttgir"])
    if beyond:
        raise RuntimeError(f"{variant.name} of {variant.shape} on {variant.arch} reads beyond a tile: {beyond}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(
        variant.name, variant.arch, variant.dtype, variant.shape, variant.tile, variant.options["num_warps"],
        variant.options["num_stages"], usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared,
        round(seconds, 2), variant.digest, source_digest(variant.kernel), triton.__version__,
    )  # fmt: skip


_shared: list[Variant] = []  # with the processes that a pool forks


def _compile_shared(index: int) -> Usage:
    return compile_variant(_shared[index])


def usages(chosen: list[Variant], processes: int = 1) -> Iterator[Usage]:
    """Compile variants in several processes; results come as they are ready."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: nothing can be compiled in this process")
    if processes == 1:
        yield from map(compile_variant, chosen)
        return
    _shared[:] = chosen
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        for done in as_completed([pool.submit(_compile_shared, index) for index in range(len(chosen))]):
            yield done.result()


def current(variant: Variant, table: Table) -> bool:
    """Whether the table has a variant, from the code and the Triton of today."""
    entry = table.get((variant.arch, variant.digest))
    return entry is not None and (entry.source, entry.triton) == (source_digest(variant.kernel), triton.__version__)


def update(groups: Iterable[list[Variant]], complete: bool, processes: int, path: Path = triton_usage.PATH) -> None:
    """Compile what the table lacks, group after group, and write it.

    A group has one dtype and architecture. If it is ``complete``, its other lines are dropped: nothing uses them.
    """
    for group in groups:
        table = triton_usage.read(path)
        if complete:
            used = {variant.digest for variant in group}
            kind = group[0].arch, group[0].dtype
            table = {k: u for k, u in table.items() if (u.arch, u.dtype) != kind or u.variant in used}
        missing = [variant for variant in group if not current(variant, table)]
        for count, usage in enumerate(usages(missing, processes), 1):
            table[usage.arch, usage.variant] = usage
            print(line_of(usage), flush=True)
            if count % UNSAVED == 0:
                triton_usage.write(table.values(), path)
        triton_usage.write(table.values(), path)


def status(groups: Iterable[list[Variant]], path: Path = triton_usage.PATH) -> int:
    """Print what the table says of the variants; 1 if it lacks one or one fails."""
    table = triton_usage.read(path)
    total = missing = failing = 0
    for group in groups:
        entries = [table.get((variant.arch, variant.digest)) for variant in group]
        lacking = [variant for variant, entry in zip(group, entries, strict=True) if entry is None]
        stale = sum(entry is not None and not current(v, table) for v, entry in zip(group, entries, strict=True))
        bad = [entry for entry in entries if entry is not None and entry.problem]
        chosen = sum(entry is not None and entry.by_choice for entry in entries)
        print(
            f"{group[0].arch:7} {group[0].dtype:9} {len(group):4} variants,"
            f" {len(lacking):3} not compiled, {stale:3} compiled from other code,"
            f" {chosen:3} spill by choice, {len(bad):3} fail"
        )
        for variant in lacking:
            print(f"        lacks {variant.name} of {variant.shape}")
        for entry in bad:
            print("       ", line_of(entry))
        total, missing, failing = total + len(group), missing + len(lacking), failing + len(bad)
    print(f"{total} variants, {missing} not compiled, {failing} fail")
    return 1 if missing or failing else 0


HEADER = "kernel          arch    dtype     shape            tile|block        warps stages  regs spills  shared   s"


def line_of(usage: Usage) -> str:
    return (
        f"{usage.kernel:15} {usage.arch:7} {usage.dtype:9} {usage.shape:16} {usage.tile:18} {usage.warps:4}"
        f" {usage.stages:6} {usage.registers:5} {usage.spilled:6} {usage.shared:7} {usage.seconds:5.1f}"
        f" {usage.problem and 'FAILS: ' + usage.problem}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=SHARED_LIMIT)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=TABLE_DTYPES, choices=DTYPES)
    parser.add_argument("--orders", nargs="+", default=ORDERS, choices=ORDERS)
    parser.add_argument("--kernels", nargs="+", default=(), metavar="NAME", help="only these, as in the first column")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=output_file, help="write what was compiled to this file as well")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--update", action="store_true", help="compile what the table lacks, and write it")
    mode.add_argument("--status", action="store_true", help="compile nothing; say what the table lacks and what fails")
    options = parser.parse_args(arguments)
    groups = (
        [v for v in variants([SHAPES[name] for name in options.shapes], dtype, arch, options.orders)
         if not options.kernels or v.name in options.kernels]
        for dtype in options.dtypes
        for arch in options.arch
    )  # fmt: skip
    if options.status:
        return status(groups)
    print(HEADER, flush=True)
    if options.update:
        complete = set(options.shapes) == set(SHAPES) and set(options.orders) == set(ORDERS) and not options.kernels
        update(groups, complete, options.processes)
        return 0
    results = []
    for group in groups:
        for usage in usages(group, options.processes):
            print(line_of(usage), flush=True)
            results.append(usage)
    failing = [usage for usage in results if usage.problem]
    seconds = sorted(usage.seconds for usage in results)
    if seconds:
        print(f"{len(results)} variants, {len(failing)} fail; compiling took {seconds[len(seconds) // 2]} s (median)")
    if options.json:
        options.json.write_text(json.dumps([asdict(usage) for usage in results], indent=1) + "\n")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
