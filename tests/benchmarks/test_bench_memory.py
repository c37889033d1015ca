"""Memory measurements of known allocations, and the worker process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.memory import WORKER_ENVIRONMENT, Memory, size_of
from benchmarks.memory_worker import ROOT, MemoryWorker
from benchmarks.problem import CannotError
from benchmarks.shapes import SHAPES
from tests.benchmarks.known_memory import SCRATCH

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")

NOISE = 1 << 20


@pytest.fixture(scope="module")
def known():
    """Answers of known_memory.py."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.known_memory"],
        cwd=ROOT,
        env={**os.environ, **WORKER_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_the_output_is_not_counted(known):
    assert known["nothing"]["returned"] == known["size"]
    assert known["nothing"]["beyond"] <= NOISE


def test_the_step_counts_the_output(known):
    assert abs(known["nothing"]["step"] - known["size"]) <= NOISE


def test_freed_scratch_is_counted(known):
    assert abs(known["scratch"]["beyond"] - SCRATCH) <= NOISE
    assert known["scratch"]["ratio"] == known["scratch"]["beyond"] / known["size"]


def test_what_the_forward_saved_counts_in_the_backward(known):
    assert known["keeps"]["returned"] == 3 * known["size"]
    assert abs(known["keeps"]["beyond"] - SCRATCH) <= NOISE


def test_freed_memory_hides_no_growth_and_counts_for_nobody_else(known):
    assert known["nothing again"]["beyond"] <= NOISE


def test_what_the_forward_freed_counts_in_the_step_alone(known):
    assert abs(known["frees"]["step"] - SCRATCH - known["size"]) <= NOISE
    assert known["frees"]["beyond"] <= NOISE


def test_views_of_one_storage_count_once():
    x = torch.zeros(1000)
    assert size_of([x, x[:10], x.view(10, 100)]) == 4000
    assert size_of([x, x.clone()]) == 8000


def test_naive_keeps_its_scores():
    """32 MiB of scores: the forward holds the scores and their softmax at once, the backward what was saved."""
    shape = replace(SHAPES["full-1k"], batch=1, heads=8, head_dim=8)
    scores = 4 * shape.heads * 1024**2
    with MemoryWorker(threads=1) as worker:
        forward = worker.measure("naive", shape, torch.float32, "forward")
        backward = worker.measure("naive", shape, torch.float32, "backward")
    assert 1.8 * scores <= forward.beyond <= 3.2 * scores
    assert 0.9 * scores <= backward.beyond <= 5 * scores
    assert forward.returned == 4 * 1024 * 8 * 8
    assert backward.returned == 3 * forward.returned


def test_the_worker_reports_what_cannot_be_and_goes_on():
    shape = replace(SHAPES["seq-65"], batch=1)
    with MemoryWorker(threads=1) as worker:
        with pytest.raises(CannotError, match="_flash_attention_for_cpu_backward is not implemented"):
            worker.measure("sdpa", shape, torch.float32, "double")
        assert isinstance(worker.measure("sdpa", shape, torch.float32, "forward"), Memory)


def test_what_was_measured_ahead_is_not_measured_again(monkeypatch):
    shape = replace(SHAPES["seq-65"], batch=1)
    can, cannot = (("sdpa", shape, torch.float32, order) for order in ("forward", "double"))
    with MemoryWorker(threads=1) as worker:
        worker.measure_ahead([can, cannot])
        monkeypatch.setattr(worker, "_ask", None)
        assert worker.measure(*can).returned == 4 * 65 * 4 * 96
        with pytest.raises(CannotError, match="is not implemented"):
            worker.measure(*cannot)


def test_a_killed_worker_is_reported_and_replaced():
    shape = replace(SHAPES["seq-65"], batch=1)
    with MemoryWorker(threads=1) as worker:
        worker.timeout = 0.01  # shorter than the start of the process
        with pytest.raises(CannotError, match="died"):
            worker.measure("naive", shape, torch.float32, "forward")
        worker.timeout = 60
        assert worker.measure("naive", shape, torch.float32, "forward").returned == 4 * 65 * 4 * 96
