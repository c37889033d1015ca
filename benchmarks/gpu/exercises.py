"""Child: what the operator tests leave to a device. One event for each exercise, with its status and reason.

- ``small``: every neighborhood, score and order once on odd little shapes, checked against float64: what
  compute-sanitizer watches.
- ``repeat``: the gradient-penalty step many times, bitwise the same results each time.
- ``compile``: ``torch.compile(fullgraph=True)``, forward and backward, against eager.
- ``graphs``: forward, backward and double backward captured in a CUDA graph and replayed on new data, bitwise equal to
  eager.
- ``streams``: the step on a stream of its own behind slow work, and on a second device that is not the current one.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.candidates import ours
from benchmarks.check import compare, expect
from benchmarks.precision import use_precision
from benchmarks.problem import ORDERS, STEPS, Attend, CannotError, Inputs, make_inputs
from benchmarks.runner import one_line
from benchmarks.shapes import SHAPES, Shape

from .child import EventLog

Results = dict[str, torch.Tensor]

# Borders, residue classes of unequal length, odd token counts, head_dims that are no power of two.
SMALL = (
    replace(SHAPES["nat-16"], batch=1, size=(15, 17), heads=2, head_dim=32),
    replace(SHAPES["nat-1024"], batch=1, size=(14, 15), heads=2, dilations=(1, 2)),
    replace(SHAPES["cifar-d1"], batch=1, size=(10, 10), window=5, heads=2, head_dim=24),
    replace(SHAPES["church-g6"], batch=1, size=(16, 16), window=16, heads=1),
    replace(SHAPES["vitgan-d"], batch=1, heads=2, head_dim=72),
    replace(SHAPES["cross-256"], batch=1, size=(70,), heads=2, head_dim=96),
)
# Enough blocks to fill a device.
LARGE = tuple(
    SHAPES[name] for name in ("nat-64", "church-g5", "church-g6", "cifar-d1", "vitgan-d", "l2-1k", "cross-1024")
)
SHAPES_OF = {"small": SMALL, "repeat": LARGE, "compile": SMALL, "graphs": SMALL, "streams": SMALL[:3]}


class _DifferentError(Exception):
    """Two results that should be the same are not."""


def small(shape: Shape, attend: Attend, inputs: Inputs, precision: str, repeats: int) -> None:
    """Every order against the float64 reference, on the CPU: a sanitizer is to see few kernels but ours."""
    on_cpu = _moved(inputs, torch.device("cpu"))
    for order in ORDERS:
        results = {name: result.cpu() for name, result in STEPS[order](attend, inputs).items()}
        _, wrong = compare(results, expect(shape, on_cpu, order), precision)
        if wrong:
            raise _DifferentError(f"{order}: {wrong}")


def repeat(shape: Shape, attend: Attend, inputs: Inputs, precision: str, repeats: int) -> None:
    """The step that holds all orders, ``repeats`` times."""
    first = STEPS["double"](attend, inputs)
    for run in range(1, repeats):
        _same_bits(STEPS["double"](attend, inputs), first, f"run {run}")


def compiled(shape: Shape, attend: Attend, inputs: Inputs, precision: str, repeats: int) -> None:
    """Compiled forward and backward against the float64 reference."""
    torch._dynamo.reset()
    # With work before and after the operator, for the compiler to fuse.
    backend = "inductor" if inputs.query.device.type == "cuda" else "aot_eager"
    fused = torch.compile(
        lambda q, k, v, table: attend(q * 1, k * 1, v * 1, table) * 1, fullgraph=True, backend=backend
    )
    for order in ("forward", "backward"):
        _, wrong = compare(STEPS[order](fused, inputs), expect(shape, inputs, order), precision)
        if wrong:
            raise _DifferentError(f"{order}: {wrong}")


def graphs(shape: Shape, attend: Attend, inputs: Inputs, precision: str, repeats: int) -> None:
    """Capture on one set of data, replay on another."""
    if inputs.query.device.type != "cuda":
        raise CannotError("CUDA graphs need a CUDA device")
    for number, order in enumerate(ORDERS):
        side = torch.cuda.Stream(inputs.query.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                STEPS[order](attend, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = STEPS[order](attend, inputs)
        _overwrite(inputs, make_inputs(shape, inputs.query.dtype, inputs.query.device, number + 1))
        graph.replay()
        torch.cuda.synchronize()
        _same_bits(captured, STEPS[order](attend, inputs), f"{order}: replay against eager")


def streams(shape: Shape, attend: Attend, inputs: Inputs, precision: str, repeats: int) -> None:
    """Inputs that arrive late on a side stream; then the last device while another is current."""
    if inputs.query.device.type != "cuda":
        raise CannotError("streams need a CUDA device")
    expected = STEPS["double"](attend, inputs)
    late = make_inputs(shape, inputs.query.dtype, inputs.query.device, seed=1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream(inputs.query.device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # some 10 ms: a kernel on another stream would see the old data
        _overwrite(late, inputs)
        results = STEPS["double"](attend, late)
    side.synchronize()
    _same_bits(results, expected, "side stream")
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    if last.index:
        there_results = STEPS["double"](attend, _moved(inputs, last))
        _same_bits({n: r.to(inputs.query.device) for n, r in there_results.items()}, expected, str(last))


EXERCISES: dict[str, Callable[[Shape, Attend, Inputs, str, int], None]] = {
    "small": small,
    "repeat": repeat,
    "compile": compiled,
    "graphs": graphs,
    "streams": streams,
}


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    def move(x: torch.Tensor) -> torch.Tensor:
        return x.detach().to(device).requires_grad_()

    query = move(inputs.query)
    key = query if inputs.key is inputs.query else move(inputs.key)
    table = None if inputs.table is None else move(inputs.table)
    return Inputs(query, key, move(inputs.value), table, move(inputs.weight))


def _overwrite(inputs: Inputs, source: Inputs) -> None:
    with torch.no_grad():
        for name in ("query", "key", "value", "table", "weight"):
            target = getattr(inputs, name)
            if target is not None:
                target.copy_(getattr(source, name))


def _same_bits(results: Results, expected: Results, what: str) -> None:
    for name, result in results.items():
        bits, others = (x.contiguous().view(torch.uint8) for x in (result, expected[name]))
        if not torch.equal(bits, others):
            number = int((result != expected[name]).sum())
            raise _DifferentError(f"{what}: {name} differs in {number} of {result.numel()} elements")


def problems(names: list[str], precisions: list[str], shrink: bool) -> Iterator[tuple[str, Shape, str]]:
    """Every exercise, shape and precision, the exercises one after the other."""
    for name in names:
        for precision in precisions:
            for shape in SMALL[:2] if shrink else SHAPES_OF[name]:
                yield name, shape, precision


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("exercises", nargs="+", choices=EXERCISES)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", action="append", required=True)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--shrink", action="store_true", help="two small shapes in every exercise")
    parser.add_argument("--stem", type=Path, required=True)
    options = parser.parse_args()
    device, log = torch.device(options.device), EventLog(options.stem)
    done = [event.get("exercise") or event.get("lost") for event in log.events()]
    for name, shape, precision in problems(options.exercises, options.precision, options.shrink):
        item = [name, options.backend, precision, f"{shape.name} {shape.describe()}"]
        if item in done:
            continue
        log.at(*item)
        with use_precision(precision) as dtype:
            status, reason = "ok", ""
            try:
                attend = ours(options.backend)(shape, device, dtype)
                EXERCISES[name](shape, attend, make_inputs(shape, dtype, device), precision, options.repeats)
            except CannotError as error:
                status, reason = "cannot", str(error)
            except _DifferentError as error:
                status, reason = "wrong", str(error)
            except Exception as error:  # whatever it is, it is reported, and the next one is tried
                traceback.print_exc()
                status, reason = "failed", one_line(error)
                _give_up_if_broken(log, item, device, reason)
        log.write(exercise=item, status=status, reason=reason)
    log.write(finished=True)


def _give_up_if_broken(log: EventLog, item: list[str], device: torch.device, reason: str) -> None:
    """After some errors every CUDA call fails: only a new process can go on."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        log.give_up(item, reason)


if __name__ == "__main__":
    main()
