"""Runs candidates over shapes and orders: check, time in turns, measure memory, one row for each."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from .candidates import Candidate
from .check import Expected, compare, expect
from .floors import Rates
from .memory import CudaAllocator, measure
from .memory_worker import MemoryWorker
from .precision import PRECISIONS
from .problem import STEPS, Attend, CannotError, Inputs, make_inputs, operator_alone
from .record import Row, relate
from .shapes import Shape
from .timing import CpuClock, CudaClock, make_clock, time_in_turns


@dataclass(frozen=True)
class Options:
    """How to run. ``budget`` is the seconds of timing that one candidate may take per shape and order; without
    ``repeats`` results are checked alone.

    ``precision`` is a name in ``benchmarks.precision``; whoever calls ``run`` is to be inside its ``use_precision``.
    ``alone``: also time each order's operator alone. Without ``check`` what comes out is not looked at.
    """

    device: torch.device
    precision: str
    orders: tuple[str, ...]
    repeats: int = 15
    budget: float = 1.0
    memory: bool = True
    progress: bool = True
    alone: bool = False
    check: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


Note = Callable[[str, str], None]
"""Told what is being done: an activity ("check", "time", ...) and the candidate's name, before each."""


def run(
    shapes: list[Shape], candidates: list[Candidate], options: Options, rates: Rates
) -> Iterator[tuple[Shape, list[Row]]]:
    """Yield every shape with the rows of one order, as soon as they are known."""
    clock = make_clock(options.device)
    steps = sum(sum(c.covers(s) for c in candidates) for s in shapes) * len(options.orders)
    with (
        tqdm(total=steps, unit="cell", disable=not options.progress or None, dynamic_ncols=True) as bar,
        MemoryWorker(torch.get_num_threads()) as worker,
    ):
        if options.memory and options.device.type == "cpu":
            bar.set_postfix_str("compile")
            compiling = [(c.name, s) for s in shapes for c in candidates if c.compiles and c.covers(s)]
            worker.measure_ahead([(name, shape, options.dtype, options.orders[0]) for name, shape in compiling])
        for shape in shapes:
            gc.collect()
            gc.freeze()  # libraries' objects, of which a compiler brings more later: garbage is collected after checks
            covering = [c for c in candidates if c.covers(shape)]
            inputs = make_inputs(shape, options.dtype, options.device)
            attends = {candidate.name: _prepare(candidate, shape, options) for candidate in covering}

            def note(activity: str, candidate: str, shape: Shape = shape) -> None:
                bar.set_postfix_str(f"{shape.name}: {activity} {candidate}")

            for order in options.orders:
                cell = _Cell(shape, order, inputs, covering, attends, options, note)
                cell.check(clock)
                if options.repeats:
                    cell.time(clock)
                    if options.alone:
                        cell.time_alone(clock)
                    if options.memory:
                        cell.measure_memory(worker)
                rows = list(cell.rows.values())
                relate(rows, rates, options.dtype.itemsize)
                bar.update(len(rows))
                yield shape, rows


def _prepare(candidate: Candidate, shape: Shape, options: Options) -> Attend | str:
    """The function, or the reason why there is none."""
    try:
        return candidate.prepare(shape, options.device, options.dtype)
    except Exception as error:  # any library may raise anything: it is reported
        return one_line(error)


class _Cell:
    """All candidates on one shape and order."""

    def __init__(
        self,
        shape: Shape,
        order: str,
        inputs: Inputs,
        candidates: list[Candidate],
        attends: dict[str, Attend | str],
        options: Options,
        note: Note,
    ) -> None:
        self.shape, self.order, self.options, self.note = shape, order, options, note
        self.candidates = {c.name: c for c in candidates}
        self.attends = attends
        self.rows = {c.name: Row(shape, order, c.name, c.group) for c in candidates}
        self.inputs = {False: inputs, True: inputs.without_table()}
        self._expected: dict[bool, Expected | str] = {}
        self._already: dict[str, float] = {}  # seconds of each call while it was checked

    def inputs_of(self, name: str) -> Inputs:
        return self.inputs[self.candidates[name].drops_table]

    def check(self, clock) -> None:
        """Run every candidate once and compare if asked to; "cannot" where it raises."""
        for name, row in self.rows.items():
            attend = self.attends[name]
            if isinstance(attend, str):
                row.status, row.reason = "cannot", attend
                continue
            self.note("check", name)
            step = self._step(name)
            clock.settle(step, False)
            begin = time.perf_counter()
            try:
                results = step()
            except Exception as error:  # as above
                row.status, row.reason = "cannot", one_line(error)
                _free()
                if self.options.device.type == "cuda":
                    torch.cuda.synchronize(self.options.device)  # raises where every later call would fail as well
                continue
            if isinstance(clock, CpuClock) and not self.candidates[name].compiles:
                self._already[name] = time.perf_counter() - begin
            expected = self._expect(self.candidates[name].drops_table) if self.options.check else "not asked for"
            if isinstance(expected, str):
                row.status, row.reason = "unchecked", expected
            else:
                errors, row.reason = compare(results, expected, self.options.precision)
                row.error, row.status = max(errors.values(), default=None), "wrong" if row.reason else "ok"
            del results
        self._expected.clear()
        _free()

    def _expect(self, without_table: bool) -> Expected | str:
        if without_table not in self._expected:
            self.note("float64 reference", "")
            try:
                expected = expect(self.shape, self.inputs[without_table], self.order)
            except RuntimeError as error:  # out of memory
                expected = f"no float64 reference: {one_line(error)}"
                _free()
            self._expected[without_table] = expected
        return self._expected[without_table]

    def time(self, clock) -> None:
        calls = {name: self._step(name) for name, row in self.rows.items() if row.status in ("ok", "unchecked")}
        options, tick = self.options, lambda name: self.note("time", name)
        rivals, others = (
            frozenset(name for name in calls if self.candidates[name].group == group) for group in ("naive", "peer")
        )
        timings = time_in_turns(calls, clock, options.repeats, options.budget, rivals, others, tick, self._already)
        for name, timing in timings.items():
            self.rows[name].timing = timing
            if isinstance(clock, CudaClock):
                self.rows[name].host = clock.host[calls[name]]

    def time_alone(self, clock) -> None:
        """One candidate after the other, since each holds a graph; not naive, whose steps are compared."""
        options = self.options
        for name, row in self.rows.items():
            if row.timing is None or row.group == "naive":
                continue
            self.note("time alone", name)
            try:
                call = operator_alone(self.attends[name], self.inputs_of(name), self.order)
                row.alone = time_in_turns({name: call}, clock, options.repeats, options.budget)[name]
            except (CannotError, RuntimeError) as error:  # out of memory, or a graph that can't be kept
                row.alone_reason = one_line(error)
            call = None
            _free()

    def _step(self, name: str) -> Callable[[], dict[str, torch.Tensor]]:
        step, attend, inputs = STEPS[self.order], self.attends[name], self.inputs_of(name)
        return lambda: step(attend, inputs)

    def measure_memory(self, worker: MemoryWorker) -> None:
        for name, row in self.rows.items():
            if row.timing is None or (row.group == "naive" and name != "naive" and row.timing.hopeless):
                continue
            self.note("memory of", name)
            try:
                if self.options.device.type == "cuda":
                    meter = CudaAllocator(self.options.device)
                    row.memory = measure(self.attends[name], self.inputs_of(name), self.order, meter)
                else:
                    row.memory = worker.measure(name, self.shape, self.options.dtype, self.order)
            except (CannotError, RuntimeError) as error:
                row.memory_reason = one_line(error)
                _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def one_line(error: Exception, limit: int = 160) -> str:
    """The telling line of an exception: the first of a CannotError, else with the exception's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["(no message)"]
    text = lines[0]
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    if not isinstance(error, CannotError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
