"""How long a call keeps the host, before and after any kernel: what a small problem on a GPU waits for.

    python -m benchmarks.host_time

needs no GPU. For ``triton`` all is real up to the driver's launch, which pretends (``kernels/pretended.py``). For
``cuda`` all that is Python is real, and the compiled operators only allocate their results. Tensors are on the CPU.
A GPU's allocator takes about as long, its launches some microseconds each, which are not in here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

import natten_ext
from natten_ext import operators
from natten_ext.backends import cuda
from natten_ext.orders import ORDERS, Order

GOALS = {"forward": 35, "forward, backward": 180}
"""Microseconds."""

BATCH, SIZE, HEADS, CHANNELS, WINDOW = 2, 8, 2, 16, 7
ROUND = 20
"""Calls in a row, after which another candidate has its turn."""


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Inside, the backend ``cuda`` takes CPU tensors, and its compiled operators only allocate their results."""

    made: dict[tuple, tuple[torch.Tensor, ...]] = {}

    def allocated(order: Order, *arguments: object) -> tuple[torch.Tensor, ...]:
        kind = order.name, arguments[order.query].shape, str(arguments[-2])
        if kind not in made:
            made[kind] = operators._fake(order, *arguments[:-1])  # without tf32
        return tuple(map(torch.empty_like, made[kind]))

    with ExitStack() as stack:
        for name, answer in {
            "_not_loaded": "", "_emulator": "pretended", "_ask_shared_limit": 232448, "_most_channels": 256,
        }.items():  # fmt: skip
            stack.enter_context(patch.object(cuda, name, lambda *_, answer=answer: answer))
        library = torch.library.Library(cuda._compiled.name, "FRAGMENT")
        stack.callback(library._destroy)
        for order in ORDERS:
            kernels = f"{order.name}_kernels"
            library.impl(kernels, lambda *arguments, order=order: allocated(order, *arguments), "CPU")
        yield


def calls_of(backend: str, table: bool, dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], object]]:
    """Calls of the public function for one problem, by what they compute."""
    shape = BATCH, SIZE, SIZE, HEADS, CHANNELS
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    extent = 2 * WINDOW - 1
    bias = torch.randn(HEADS, extent, extent, requires_grad=True) if table else None
    leaves = [x for x in (query, key, value, bias) if x is not None]
    grad = torch.randn(shape, dtype=dtype)

    def forward() -> torch.Tensor:
        return natten_ext.neighborhood_attention(query, key, value, WINDOW, bias=bias, backend=backend)

    def unrecorded() -> None:
        with torch.no_grad():
            forward()

    def backward(create_graph: bool = False) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, grad, create_graph=create_graph)

    def double_backward() -> None:
        torch.autograd.grad(backward(True)[0], leaves, grad)

    return {
        "forward, no gradient": unrecorded,
        "forward": forward,
        "forward, backward": backward,
        "forward, backward, double backward": double_backward,
    }


def plain_calls() -> dict[str, Callable[[], object]]:
    """To compare machines by."""
    x = torch.randn(BATCH, SIZE, SIZE, HEADS, CHANNELS)
    return {"six additions of plain PyTorch": lambda: [torch.add(x, x) for _ in range(6)]}


def timed(calls: dict[tuple, Callable[[], object]], rounds: int) -> dict[tuple, list[float]]:
    """Microseconds of the calls, in turns."""
    times: dict[tuple, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            for _ in range(ROUND):
                start = time.perf_counter()
                call()
                if turn:  # the first compiles and plans
                    times[name].append(1e6 * (time.perf_counter() - start))
    return times


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"], choices=["triton", "cuda"])
    parser.add_argument("--rounds", type=int, default=50, help=f"of {ROUND} calls each")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        if "triton" in options.backends:
            from .kernels import pretended

            stack.enter_context(pretended.gpu())
        if "cuda" in options.backends:
            stack.enter_context(pretended_cuda())
        calls = {("torch", "", name): call for name, call in plain_calls().items()}
        for backend in options.backends:
            for table in (False, True):
                problem = "table" if table else "no table"
                calls |= {(backend, problem, name): call for name, call in calls_of(backend, table).items()}
        times = timed(calls, options.rounds)
    print(
        "| backend | problem | call | median (us) | least (us) | goal (us) |\n| --- | --- | --- | ---: | ---: | ---: |"
    )
    for (backend, problem, name), samples in times.items():
        goal = GOALS.get(name, "")
        print(f"| {backend} | {problem} | {name} | {statistics.median(samples):.0f} | {min(samples):.0f} | {goal} |")


if __name__ == "__main__":
    main()
