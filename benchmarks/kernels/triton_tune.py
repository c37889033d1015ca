"""Choose tile sizes, warps and pipeline stages by timing them on this machine's GPU, and write them to configs.json.

    python -m benchmarks.kernels.triton_tune --dtypes bfloat16 --shapes nat-256 nat-512

times every candidate of every kernel on the named shapes (``benchmarks/shapes.py``), takes
the one with the least time over the shapes of a class, and writes it to the section of the GPU's architecture after
each class. What is not tuned keeps its default.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton import testing

from benchmarks.shapes import SHAPES
from natten_ext.backends.triton import configs
from natten_ext.backends.triton.configs import Config
from natten_ext.backends.triton.launch import recorded_launches

from .triton_problems import DTYPES, ORDERS, run_orders, torch_dtype
from .triton_work import PASSES, launch_of

Timer = Callable[[Any, int, tuple, dict], float]
"""Milliseconds of a launch ``(kernel, programs, arguments, options)``; infinity if it can't run."""


def candidates(channels: int, half: bool) -> Iterator[Config]:
    """What is tried for a class: what is likely to fit the registers."""
    if channels > 128 or (channels > 64 and not half):
        # Rows do not fit the registers: warps share the channels of few rows, where blocks are wider than tiles.
        for own, block in ((16, 32), (16, 64), (32, 64), (64, 16)):
            for warps in (4, 8):
                for chunk in (32, 64):
                    yield Config(own, block, warps, 1, chunk)
        return
    # Each warp takes 16 positions of a tile.
    for own, warps in ((32, 2), (64, 4), (128, 8)):
        for block in (16, 32, 64):
            for stages in (1, 2, 3):
                yield Config(own, block, warps, stages)


def time_launch(kernel: Any, programs: int, arguments: tuple, options: dict) -> float:
    """Median milliseconds of a launch on the current device."""
    try:
        compiled = kernel[(programs,)](*arguments, **options)
        if compiled.n_spills:
            return math.inf
        again = functools.partial(kernel[(programs,)], *arguments, **options)
        return testing.do_bench(again, warmup=5, rep=20, return_mode="median")
    except (triton.runtime.errors.OutOfResources, triton.CompilationError):
        return math.inf


def classes(shapes: Iterable[Any], dtype: torch.dtype) -> dict[tuple[str, int], list[Any]]:
    """Shapes by shape class and channel class."""
    groups: dict[tuple[str, int], list[Any]] = {}
    for shape in shapes:
        key = launch_of(shape, dtype).problem.shape_class, configs.channel_class(shape.head_dim)
        groups.setdefault(key, []).append(shape)
    return groups


def time_config(
    config: Config, step: str, order: str, shapes: Iterable[Any], dtype: torch.dtype, device: str, timer: Timer
) -> float:
    """Milliseconds of one step over some shapes."""
    total = 0.0
    for shape in shapes:
        launches: list[tuple] = []
        with configs.forced(config), recorded_launches(lambda *launch: launches.append(launch)):  # noqa: B023
            run_orders(shape, dtype, device, [order])
        total += sum(timer(*launch) for launch in launches if _step_of(launch[0].fn.__name__, order) == step)
        if math.isinf(total):
            break
    return total


def _step_of(kernel: str, order: str) -> str:
    name = kernel.removesuffix("_kernel")
    return {"table_shares": "table" if order == "backward" else "double_table"}.get(name, name)


def tune(
    shapes: Iterable[Any], dtypes: Iterable[str], steps: Iterable[str], section: str, path: Path, device: str,
    timer: Timer, report: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Time the candidates of every step and class, and write the best to ``path`` after each."""
    for name in dtypes:
        dtype = torch_dtype(name)
        kind = configs.dtype_class(dtype, name != "tf32")
        for (shape_class, channels), group in classes(shapes, dtype).items():
            for order in ORDERS:
                for step, _, _ in PASSES[order]:
                    chosen = [shape for shape in group if shape.table] if step.endswith("table") else group
                    if step not in steps or not chosen:
                        continue
                    start = time.perf_counter()
                    times = {
                        config: time_config(config, step, order, chosen, dtype, device, timer)
                        for config in candidates(channels, kind == "half")
                    }
                    best = min(times, key=times.__getitem__)
                    key = f"{step}/{shape_class}/{kind}/{channels}"
                    if math.isinf(times[best]):
                        report(f"{key}: no candidate runs without spills")
                        continue
                    table = configs.read(path)
                    table.setdefault(section, {})[key] = list(best)
                    configs.write(table, path)
                    report(f"{key}: {tuple(best)}, {times[best]:.3f} ms ({time.perf_counter() - start:.0f} s to find)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--steps", nargs="+", default=configs.STEPS, choices=configs.STEPS)
    parser.add_argument("--output", type=Path, default=configs.PATH, help="table to update (default: the package's)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU: torch finds no CUDA device")
    section = configs.architecture(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}: section {section} of {options.output}")
    shapes = [SHAPES[name] for name in options.shapes]
    tune(shapes, options.dtypes, options.steps, section, options.output, "cuda", time_launch)


if __name__ == "__main__":
    main()
