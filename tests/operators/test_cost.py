"""How the CPU kernels split work between threads (csrc/cpu/cost.h), against threads that are played through."""

from __future__ import annotations

import heapq
import subprocess
import sys
from pathlib import Path

import pytest

import natten_ext
from natten_ext import _C

MICROSECOND, MILLISECOND = 1e3, 1e6


def finish(tasks: list[float], threads: int) -> float:
    """When the last of some tasks ends that threads take in their order."""
    free = [0.0] * threads
    for task in tasks:
        heapq.heapreplace(free, free[0] + task)
    return max(free)


def test_small_work_stays_on_the_calling_thread_and_large_work_is_shared():
    assert _C.worthwhile_threads(5 * MICROSECOND, 2) == 1
    assert _C.worthwhile_threads(100 * MICROSECOND, 2) == 2
    assert _C.worthwhile_threads(100 * MICROSECOND, 1) == 1
    assert 2 < _C.worthwhile_threads(100 * MICROSECOND, 64) < 32
    assert _C.worthwhile_threads(100 * MILLISECOND, 64) == 64
    assert _C.worthwhile_threads(float("inf"), 7) == 7  # of a cost that nobody knows
    worth = [_C.worthwhile_threads(1.3**n, 16) for n in range(60)]
    assert worth == sorted(worth)  # more work, no fewer threads


def test_small_jobs_are_gathered_as_long_as_all_threads_have_several_tasks():
    assert _C.jobs_per_task(1 * MICROSECOND, 100_000, 2) == 20
    assert _C.jobs_per_task(1 * MICROSECOND, 16, 2) == 2
    assert _C.jobs_per_task(1 * MILLISECOND, 100_000, 2) == 1
    assert _C.jobs_per_task(1 * MICROSECOND, 3, 4) == 1


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("jobs", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("blocks", [1, 2, 7, 64])
@pytest.mark.parametrize("again", [0, 3 * MICROSECOND])
def test_queries_are_divided_where_threads_would_be_idle(jobs, blocks, threads, again):
    block = 10 * MICROSECOND
    size = _C.blocks_per_task(jobs, blocks, block, again, threads)
    assert 1 <= size <= blocks
    sizes = [min(size, blocks - first) for first in range(0, blocks, size)] * jobs
    tasks = [again + block * some for some in sizes]
    whole = finish([again + block * blocks] * jobs, threads)
    assert finish(tasks, threads) <= 1.001 * whole
    if threads == 1 or (jobs % threads == 0 and again > 0):
        assert size == blocks
    if (jobs, blocks, threads) == (1, 64, 2):
        assert finish(tasks, threads) <= 0.51 * whole + again


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("jobs", range(1, 12))
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("pieces", [(2, 3), (8, 8)])
def test_jobs_are_split_where_that_ends_earlier(jobs, threads, share, pieces):
    """A split job takes ``share`` of its time for its queries, and again for its keys."""
    whole = 10 * MILLISECOND
    split = _C.jobs_to_split(jobs, whole, share * whole, share * whole, *pieces, threads)
    assert 0 <= split <= jobs
    of_queries, of_keys = ([share * whole / number] * (number * split) for number in pieces)
    time = finish([whole] * (jobs - split) + of_queries, threads) + finish(of_keys, threads)
    assert time <= 1.001 * finish([whole] * jobs, threads)
    if jobs % threads == 0:
        assert split == 0
    if (jobs, threads, share, pieces) in ((1, 2, 0.7, (8, 8)), (3, 2, 0.7, (8, 8))):
        assert split == 1  # 7 instead of 10, 17 instead of 20


def test_no_job_is_split_for_less_than_starting_threads_takes():
    assert _C.jobs_to_split(1, 5 * MICROSECOND, 3 * MICROSECOND, 3 * MICROSECOND, 8, 8, 2) == 0


def test_rows_of_neighborhoods_are_worked_on_in_parts_that_fit_a_cache():
    parts = [_C.positions_together(1.2**n, 128) for n in range(100)]
    assert parts == sorted(parts, reverse=True) and (parts[0], parts[-1]) == (512, 128)
    assert all(part * 1.2**n <= 1.001 * (2 << 20) for n, part in enumerate(parts) if part > 128)


STARTED = """
import os, sys, torch, natten_ext

def threads_started(side):
    x = torch.randn(1, side, side, 2, 8)
    before = len(os.listdir("/proc/self/task"))
    if sys.argv[1] == "full":
        natten_ext.attention(*[x.flatten(1, 2)] * 3, backend="cpu")
    else:
        natten_ext.neighborhood_attention(x, x, x, 3, backend="cpu")
    return len(os.listdir("/proc/self/task")) - before

torch.set_num_threads(2)
print(threads_started(6), threads_started(64))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(
    not any(status.name == "cpu" and status.available for status in natten_ext.list_backends()),
    reason="the cpu backend is not built",
)
@pytest.mark.parametrize("kind", ["full", "neighborhood"])
def test_threads_are_started_by_large_problems_alone(kind):
    """The pool of torch's threads begins with the first work that is shared."""
    done = subprocess.run([sys.executable, "-c", STARTED, kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert small == 0 and large == 1
