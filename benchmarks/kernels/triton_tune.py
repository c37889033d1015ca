"""Choose tile sizes, warps and pipeline stages by timing them on this machine's GPU, and write them to configs.json.

    python -m benchmarks.kernels.triton_tune

tunes what fits ten minutes: forward, backward_key and table of nat-256, church-g5 and l2-1k (``benchmarks/shapes.py``),
in bfloat16. Others are asked for by name. For every step and class of shapes, the candidates are compiled in parallel,
and those that spill or need too much shared memory dropped. Then the configuration in use and they run one after the
other in a process of their own, which is started again if one ends it. What takes more than a minute, to compile or to
run, is ended and dropped, and the rest goes on. What differs from the results of the
configuration in use is dropped as well. The fastest over the shapes of the class goes to the section of the GPU's
architecture. What is not tuned keeps its default.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton import testing

from benchmarks.shapes import SHAPES
from natten_ext.backends.triton import configs, plans
from natten_ext.backends.triton.configs import Config
from natten_ext.orders import FORWARD, Order

from .triton_problems import DTYPES, ORDERS, orders_of, torch_dtype
from .triton_resources import compile_variant, variants
from .triton_work import PASSES, launch_of

DEFAULT_SHAPES = ("nat-256", "church-g5", "l2-1k")
DEFAULT_STEPS = ("forward", "backward_key", "table")
MINUTES = 10.0
SECONDS = 60.0
"""That a configuration may take to compile, and to run: some never end."""

KERNELS = {step: step for step in configs.STEPS} | {"table": "table_shares", "double_table": "table_shares"}
ORDER_OF = {step: order for order in ORDERS for step, _, _ in PASSES[order]}

TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "tf32": 3e-3, "float32": 1e-5, "float64": 1e-12}
"""How far results may be from those of the configuration in use: norm of the difference over norm."""


class Task(NamedTuple):
    """A configuration of a step, for some shapes."""

    step: str
    dtype: str
    shapes: tuple[str, ...]
    config: Config
    device: str


class Measured(NamedTuple):
    """``difference`` is from the results of the configuration in use, as ``TOLERANCE``."""

    milliseconds: float
    difference: float


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
        for block in (16, 32, 64, 128):
            for stages in (1, 2, 3) if block < 128 else (1, 2):
                yield Config(own, block, warps, stages)


def classes(shapes: Iterable[Any], dtype: torch.dtype) -> dict[tuple[str, int], list[Any]]:
    """Shapes by shape class and channel class."""
    groups: dict[tuple[str, int], list[Any]] = {}
    for shape in shapes:
        key = launch_of(shape, dtype).problem.shape_class, configs.channel_class(shape.head_dim)
        groups.setdefault(key, []).append(shape)
    return groups


# ---------------------------------------------------------------------------------------------- processes of their own


def within(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives, in a process that is ended, with a traceback, if that takes longer.

    From inside of it, and whatever it does: compiling with the interpreter locked, or waiting for a GPU.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        return function(*arguments)
    finally:
        faulthandler.cancel_dump_traceback_later()


def ended(what: str, start: float, seconds: float) -> str:
    """Why a process is no longer there, which had its task since ``start``."""
    return f"not done after {seconds:g} s" if time.monotonic() - start >= seconds else what


# ---------------------------------------------------------------------------------------------- compiling


def trouble(task: Task, arch: str) -> str:
    """Compile the kernel of a step, for Triton's cache as well; what speaks against it, or empty."""
    with configs.forced(task.config, task.step):
        found = variants([SHAPES[name] for name in task.shapes], task.dtype, arch, [ORDER_OF[task.step]])
    for variant in found:
        if variant.name == KERNELS[task.step]:
            usage = compile_variant(variant)
            if usage.spilled or usage.problem:
                return usage.problem or f"spills {usage.spilled} bytes per thread"
    return ""


def compiled(
    tasks: list[Task], arch: str, processes: int, report: Callable[[str], None], seconds: float = SECONDS,
    trouble: Callable = trouble,
) -> list[Task]:  # fmt: skip
    """Compile in parallel processes; the tasks that nothing speaks against, in order."""
    against: dict[Task, str] = {}
    left = list(tasks)
    while left:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(within, seconds, trouble, task, arch): task for task in left}
            start = time.monotonic()
            for future in as_completed(futures):
                try:
                    against[futures[future]] = future.result()
                except BrokenProcessPool:
                    continue
                except Exception as error:  # of a compiler, of any kind
                    against[futures[future]] = f"{type(error).__name__}: {error}"
                start = time.monotonic()
        undone = [task for task in left if task not in against]
        # A compiler that crashes or is ended takes the others with it: alone, it shows which it was.
        if undone and processes == 1:
            against[undone[0]] = ended("the compiler crashed", start, seconds)
            undone = undone[1:]
        left, processes = undone, 1
    for task, reason in against.items():
        if reason:
            report(f"  {tuple(task.config)} is left out: {reason.splitlines()[0]}")
    return [task for task in tasks if not against[task]]


# ---------------------------------------------------------------------------------------------- running


def arguments_of(order: Order, arguments: tuple, device: str) -> list[Any]:
    """The order's arguments with random numbers in the place of empty tensors, and the forward's results."""
    generator = torch.Generator(device).manual_seed(0)
    given = order.operands(*arguments)._asdict()
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            given[name] = torch.empty_like(value).normal_(generator=generator)
    if "output" in given:
        names = list(FORWARD.types)[:-1]  # without return_lse
        given["output"], given["lse"], _ = plans.run(FORWARD, [*(given[name] for name in names), False])
    return list(given.values())


@functools.lru_cache(maxsize=4)
def _problem(step: str, dtype: str, shape: str, device: str) -> tuple[Order, list[Any], plans.Results]:
    """An order, its arguments and its results with the configurations in use."""
    ((order, arguments),) = orders_of(SHAPES[shape], torch_dtype(dtype), device, [ORDER_OF[step]])
    arguments = arguments_of(order, arguments, device)
    return order, arguments, plans.run(order, arguments)


def measure(task: Task) -> Measured:
    """Time and results of a step's configuration, on the device."""
    total = difference = 0.0
    for shape in task.shapes:
        order, arguments, expected = _problem(task.step, task.dtype, shape, task.device)
        times: list[float] = []

        def launch(plan, tensors, addresses, ready, times=times):
            for step in plan.steps:
                again = functools.partial(plan._compile_and_launch, step, tensors)
                again()
                if step.kernel.fn.__name__ == f"{KERNELS[task.step]}_kernel":
                    times.append(_milliseconds(again, task.device))

        with configs.forced(task.config, task.step), patch.object(plans.Plan, "_launch", launch):
            results = plans.run(order, arguments)
        total += sum(times)
        for result, wanted in zip(results, expected, strict=True):
            if wanted is not None and wanted.numel():
                result, wanted = result.double(), wanted.double()
                # Not a number is as far as can be.
                distance = float((result - wanted).norm() / wanted.norm().clamp(min=1e-30))
                difference = max(difference, distance if math.isfinite(distance) else math.inf)
    return Measured(total, difference)


def _milliseconds(launch: Callable[[], None], device: str) -> float:
    if device == "cuda":
        return testing.do_bench(launch, warmup=5, rep=20, return_mode="median")
    start = time.perf_counter()
    launch()
    return 1e3 * (time.perf_counter() - start)


class Runner:
    """Runs tasks in a process of its own, and goes on in another where a task ends it or leaves the GPU broken."""

    def __init__(self, measure: Callable[[Task], Measured] = measure, seconds: float = SECONDS) -> None:
        self._measure, self._seconds = measure, seconds
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, task: Task) -> Measured | str:
        """The measurement, or what went wrong."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        start = time.monotonic()
        try:
            return self._pool.submit(within, self._seconds, self._measure, task).result()
        except BrokenProcessPool:
            self.close()
            return ended("it ended the process", start, self._seconds)
        except Exception as error:  # an illegal address, say, after which nothing runs in this process
            self.close()
            return f"{type(error).__name__}: {error}".splitlines()[0]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


# ---------------------------------------------------------------------------------------------- choosing


def tasks_of(step: str, dtype: str, group: Iterable[Any], channels: int, arch: str, device: str) -> list[Task]:
    """The configuration in use, then the candidates; each once, as tiles are fitted to the shapes."""
    kind = torch_dtype(dtype)
    full = dtype != "tf32"
    shapes = [shape for shape in group if shape.table or not step.endswith("table")]
    if not shapes:
        return []
    problem = launch_of(shapes[0], kind).problem
    with configs.assumed_architecture(arch):
        in_use = configs.lookup(torch.device("meta"), step, problem.shape_class, kind, full, problem.head_dim)
    tried = dict.fromkeys([in_use, *candidates(channels, configs.dtype_class(kind, full) == "half")])
    names = tuple(shape.name for shape in shapes)
    return [Task(step, dtype, names, config, device) for config in tried]


def best_of(tasks: list[Task], run: Callable[[Task], Measured | str], report: Callable[[str], None]) -> Task | None:
    """The fastest task with the right results, of which the first is the configuration in use."""
    times: dict[Task, float] = {}
    for task in tasks:
        measured = run(task)
        if isinstance(measured, str):
            report(f"  {tuple(task.config)} is left out: {measured}")
        elif measured.difference > TOLERANCE[task.dtype]:
            report(f"  {tuple(task.config)} is left out: its results differ by {measured.difference:.1e}")
        else:
            times[task] = measured.milliseconds
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    report(f"  {tuple(best.config)} takes {times[best]:.3f} ms, {tuple(tasks[0].config)} " + (
        f"{times[tasks[0]]:.3f} ms" if tasks[0] in times else "fails"
    ))  # fmt: skip
    return best


def tune(
    shapes: Iterable[Any], dtypes: Iterable[str], steps: Iterable[str], section: str, path: Path, device: str,
    compiled: Callable[[list[Task]], list[Task]], run: Callable[[Task], Measured | str],
    minutes: float = math.inf, report: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Choose for every step and class, and write the best to ``path`` after each; none is begun after ``minutes``."""
    start = time.monotonic()
    for dtype in dtypes:
        kind = configs.dtype_class(torch_dtype(dtype), dtype != "tf32")
        for (shape_class, channels), group in classes(shapes, torch_dtype(dtype)).items():
            for step in steps:
                tasks = tasks_of(step, dtype, group, channels, section, device)
                if not tasks:
                    continue
                key = f"{step}/{shape_class}/{kind}/{channels}"
                if time.monotonic() - start > 60 * minutes:
                    report(f"{key}: not tuned, {minutes:g} minutes are over")
                    continue
                report(f"{key}: {len(tasks)} configurations")
                # The one in use is measured whatever the compiler says of it.
                best = best_of([tasks[0], *compiled(tasks[1:])], run, report)
                if best is not None:
                    table = configs.read(path)
                    table.setdefault(section, {})[key] = list(best.config)
                    configs.write(table, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=DEFAULT_SHAPES, choices=SHAPES, metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--steps", nargs="+", default=DEFAULT_STEPS, choices=configs.STEPS)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin nothing after them (default: 10)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that one may compile, or run (default: 60)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--output", type=Path, default=configs.PATH, help="table to update (default: the package's)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU: torch finds no CUDA device")
    section = configs.architecture(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}: section {section} of {options.output}")
    runner = Runner(seconds=options.seconds)
    try:
        tune(
            [SHAPES[name] for name in options.shapes], options.dtypes, options.steps, section, options.output, "cuda",
            lambda tasks: compiled(tasks, section, options.processes, print, options.seconds), runner, options.minutes,
        )  # fmt: skip
    finally:
        runner.close()


if __name__ == "__main__":
    main()
