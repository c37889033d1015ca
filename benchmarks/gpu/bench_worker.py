"""Child: measures the cells of a plan. One event for the rates of each precision and for the rows of each order.

When this process is started again, what has been measured is skipped, and so is a candidate that was lost (it broke
the CUDA context, hung, or took the process with it): its row says so.

``--compile-only NUMBER/WORKERS`` runs our backends once on every cell of the first pass that falls to this worker,
measures how long each first call takes, and leaves compiled kernels in the caches on disk.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import natten_ext
from benchmarks.candidates import Candidate, find_candidates
from benchmarks.floors import Rates, measure_rates
from benchmarks.memory_worker import MemoryWorker
from benchmarks.precision import use_precision
from benchmarks.problem import ORDERS, STEPS, make_inputs
from benchmarks.runner import Note, Options, Row, one_line, run_shape
from benchmarks.suites import SUITES
from benchmarks.timing import make_clock

from .bench_plan import Cell
from .child import EventLog

MAX_LOST = 4  # cells in which a candidate may be lost before it is left out


class Worker:
    """State that lasts over cells: the clock, the rates, and what earlier processes measured and lost."""

    def __init__(self, plan: dict[str, Any], log: EventLog) -> None:
        self.plan, self.log = plan, log
        self.device = torch.device(plan["device"])
        self.shapes = {shape.name: shape for shape in SUITES[plan["suite"]]}
        self.clock = make_clock(self.device)
        self.rates: dict[str, Rates] = {}
        self.done: set[tuple[str, str]] = set()
        self.lost: dict[str, dict[str, str]] = {}  # by cell and candidate ("" for what all share): the reason
        for event in log.events():
            if "rates" in event:
                self.rates[event["precision"]] = Rates(**event["rates"])
            elif "rows" in event:
                self.done.add((event["cell"], event["order"]))
            elif "lost" in event:
                cell, candidate, activity = event["lost"]
                self.lost.setdefault(cell, {})[candidate] = f"{event['reason']} (at: {activity})"

    def measure(self, cell: Cell, memory: MemoryWorker) -> None:
        """All orders of a cell that have not been measured."""
        orders = tuple(order for order in ORDERS if (cell.name, order) not in self.done)
        if not orders or "" in self.lost.get(cell.name, {}):
            return
        note = self._notes_of(cell)
        with use_precision(cell.precision) as dtype:
            if cell.precision not in self.rates:
                note("rates", "")
                self.rates[cell.precision] = measure_rates(self.device, dtype, self.plan["rate_samples"])
                self.log.write(precision=cell.precision, rates=self.rates[cell.precision].to_dict())
            shape = self.shapes[cell.shape]
            candidates = [c for c in self._candidates(cell, dtype) if c.covers(shape)]
            gone = {c.name: reason for c in candidates if (reason := self._why_gone(cell, c.name))}
            options = Options(
                self.device, cell.precision, orders, self.plan["repeats"], self.plan["budget"],
                memory=self.plan["memory"], alone=True,
            )  # fmt: skip
            running = [c for c in candidates if c.name not in gone]
            rates = self.rates[cell.precision]
            of_orders = run_shape(shape, running, options, rates, self.clock, memory, note)
            for order, rows in zip(orders, of_orders, strict=True):
                rows += [Row(shape, order, c.name, c.group, "lost", gone[c.name]) for c in candidates if c.name in gone]
                note("report", "")
                self.log.write(cell=cell.name, order=order, plan=cell.to_dict(), rows=[slim(row) for row in rows])

    def _notes_of(self, cell: Cell) -> Note:
        before = [cell.name, "", "start"]

        def note(activity: str, candidate: str) -> None:
            nonlocal before
            if self.device.type == "cuda":
                try:
                    torch.cuda.synchronize(self.device)
                except RuntimeError as error:  # the context is broken for good, by what ran before
                    self.log.give_up(before, one_line(error))
            before = [cell.name, candidate, activity]
            self.log.at(*before)

        return note

    def _candidates(self, cell: Cell, dtype: torch.dtype) -> list[Candidate]:
        found = find_candidates(self.device, dtype, available(self.plan, self.device, dtype), tuple(self.plan["peers"]))
        compiled = cell.candidates == "compiled"
        return [c for c in found if c.compiles == compiled or (compiled and c.group == "ours")]

    def _why_gone(self, cell: Cell, name: str) -> str:
        reasons = [lost[name] for lost in self.lost.values() if name in lost]
        if name in self.lost.get(cell.name, {}):
            return self.lost[cell.name][name]
        return f"lost in {len(reasons)} cells before: {reasons[-1]}" if len(reasons) >= MAX_LOST else ""


def slim(row: Row) -> dict[str, Any]:
    """Without what the document holds once for every shape, and with few digits."""
    fields = {name: value for name, value in row.to_dict().items() if name not in ("problem", "errors")}
    if fields["samples"]:
        fields["samples"] = [float(f"{sample:.4g}") for sample in fields["samples"]]
    return fields


def available(plan: dict[str, Any], device: torch.device, dtype: torch.dtype) -> list[str]:
    """Our backends that the plan names and that can run this dtype here."""
    return [s.name for s in natten_ext.list_backends(device, dtype) if s.available and s.name in plan["backends"]]


def compile_only(plan: dict[str, Any], log: EventLog, share: str) -> None:
    """First calls of our backends, each step once."""
    number, workers = map(int, share.split("/"))
    device, shapes = torch.device(plan["device"]), {shape.name: shape for shape in SUITES[plan["suite"]]}
    done = [event.get("compiled") or event.get("lost") for event in log.events()]
    first_pass = [Cell(**cell) for cell in plan["cells"] if cell["candidates"] == "quick"]
    for cell in first_pass[number::workers]:
        shape = shapes[cell.shape]
        with use_precision(cell.precision) as dtype:
            for candidate in find_candidates(device, dtype, available(plan, device, dtype), ()):
                item = [cell.name, candidate.name, "first call"]
                if item in done:
                    continue
                log.at(*item)
                inputs, seconds, reason = make_inputs(shape, dtype, device), {}, ""
                attend = candidate.prepare(shape, device, dtype)
                try:
                    for order in ORDERS:
                        begin = time.perf_counter()
                        STEPS[order](attend, inputs)
                        if device.type == "cuda":
                            torch.cuda.synchronize(device)
                        seconds[order] = round(time.perf_counter() - begin, 3)
                except Exception as error:  # it is reported; the benchmark proper says more
                    reason = one_line(error)
                    try:
                        if device.type == "cuda":
                            torch.cuda.synchronize(device)
                    except RuntimeError:
                        log.give_up(item, reason)
                log.write(compiled=item, seconds=seconds, reason=reason)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--stem", type=Path, required=True)
    parser.add_argument("--compile-only", metavar="NUMBER/WORKERS")
    options = parser.parse_args()
    plan, log = json.loads(options.plan.read_text()), EventLog(options.stem)
    if options.compile_only:
        compile_only(plan, log, options.compile_only)
    else:
        worker = Worker(plan, log)
        with MemoryWorker(torch.get_num_threads()) as memory:
            for cell in plan["cells"]:
                worker.measure(Cell(**cell), memory)
    log.write(finished=True)


if __name__ == "__main__":
    main()
