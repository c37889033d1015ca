"""The benchmark's worker: what was lost is left out and said so, and a broken CUDA context ends the process."""

import types
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.bench_plan import BESIDE_FLEX, FIGURES, Cell, cells
from benchmarks.gpu.bench_worker import MAX_LOST, Worker
from benchmarks.gpu.child import EventLog
from benchmarks.shapes import SHAPES
from benchmarks.timing import CudaClock, time_in_turns

CELL = Cell("cifar-d2", "float32", "quick")
PRECISIONS = ["bfloat16", "float16", "float32", "tf32"]


@pytest.fixture
def measured(tmp_path):
    """The rows of CELL by candidate, in a worker that is told of earlier losses; forward alone is left to do."""

    def run(*lost):
        log = EventLog(tmp_path / "w")
        log.write(precision="float32", rates={"fmas": 1e9, "exps": 1e9, "bytes": 1e9})
        for order in ("backward", "double"):
            log.write(cell=CELL.name, order=order, rows=[], plan=CELL.to_dict())
        for cell, candidate in lost:
            log.write(lost=[cell, candidate, "check"], reason="killed by SIGSEGV")
        plan = {"device": "cpu", "suite": "smoke", "backends": ["cpu"], "peers": ["naive", "sdpa"], "repeats": 1,
                "budget": 0, "memory": False, "rate_samples": 1}  # fmt: skip
        Worker(plan, log).measure(CELL, None)
        events = [event for event in log.events() if event.get("order") == "forward"]
        return {row["candidate"]: row for event in events for row in event["rows"]}

    return run


def test_what_was_lost_is_not_tried_again(measured):
    rows = measured((CELL.name, "naive"))
    assert (rows["naive"]["status"], rows["naive"]["reason"]) == ("lost", "killed by SIGSEGV (at: check)")
    assert rows["naive"]["median"] is None
    assert (rows["cpu"]["status"], rows["sdpa-math"]["status"]) == ("ok", "ok")


def test_what_is_lost_again_and_again_is_left_out(measured):
    rows = measured(*((f"nat-{i}, float32, quick", "sdpa-math") for i in range(MAX_LOST)), ("nat-9", "naive"))
    assert rows["sdpa-math"]["reason"].startswith(f"lost in {MAX_LOST} cells before: killed by SIGSEGV")
    assert rows["naive"]["status"] == "ok"


def test_a_cell_that_is_lost_as_a_whole_is_skipped(measured):
    assert measured((CELL.name, "")) == {}


def test_a_broken_context_is_the_fault_of_what_ran_last(tmp_path, monkeypatch):
    worker = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), log=EventLog(tmp_path / "w"))
    given_up = []
    monkeypatch.setattr(worker.log, "give_up", lambda item, reason: given_up.append((item, reason)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    note = Worker._notes_of(worker, CELL)
    note("check", "triton")
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    note("check", "naive")
    assert given_up == [([CELL.name, "triton", "check"], "RuntimeError: CUDA error: an illegal memory access")]


def broken(device):
    raise RuntimeError("CUDA error: an illegal memory access")


def test_the_plan_has_every_cell_once_and_the_figures_first():
    plan = cells("gpu", PRECISIONS)
    assert len(set(plan)) == len(plan) == len(SHAPES) * len(PRECISIONS) * 2
    assert {cell.shape for cell in plan[: len(FIGURES)]} == set(FIGURES)
    assert {cell.precision for cell in plan[: len(SHAPES)]} == {"bfloat16"}
    assert plan[len(SHAPES)] == Cell(BESIDE_FLEX[0], "bfloat16", "compiled")


class FakeCuda:
    """A device that does work in order and tells the time between events; the host takes time to queue a call."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        self.slept = []
        monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.wait())
        properties = types.SimpleNamespace(L2_cache_size=1 << 10)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def run(self, seconds):
        self.device = max(self.device, self.host) + seconds

    def sleep(self, cycles):
        self.slept.append(cycles)
        self.run(cycles / 2e9)

    def wait(self):
        self.host = max(self.host, self.device)


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = max(self.cuda.device, self.cuda.host)

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_the_device_clock_leaves_out_the_time_of_python(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    clock = CudaClock(torch.device("cpu"))
    assert clock.cycles_per_second == pytest.approx(2e9)

    def call():
        for _ in range(10):
            cuda.host += 1e-4  # Python
            cuda.run(1e-5)

    timing = time_in_turns({"x": call}, clock, repeats=5, budget=10)["x"]
    assert timing.median == pytest.approx(1e-4)
    assert clock.host[call] == pytest.approx(1e-3)
    assert max(cuda.slept) < 2e9 * 2e-3


def test_the_figures_are_about_named_shapes():
    assert {*FIGURES, *BESIDE_FLEX} <= set(SHAPES)
    assert replace(CELL, candidates="compiled").name == "cifar-d2, float32, compiled"
