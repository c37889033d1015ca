"""Times of several candidates, taken in turns so that a machine's drift and noise fall on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MIN_SAMPLE = 0.02  # seconds; shorter calls are repeated within a sample
MIN_SAMPLES = 3
HOPELESS = 3.0


@dataclass(frozen=True)
class Timing:
    """Seconds per call. ``spread`` is half the distance between the quartiles, relative to the median.

    ``hopeless``: one of several rivals, and so much slower than the fastest that one sample was enough.
    """

    samples: list[float]
    hopeless: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.median


class CpuClock:
    """Wall time per call."""

    def sample(self, call: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """Device time per call by events, with the L2 cache overwritten before each call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(2 * l2_bytes, 1 << 27), dtype=torch.uint8, device=device)

    def sample(self, call: Callable[[], object], calls: int) -> float:
        events = []
        for _ in range(calls):
            # Filling this buffer also gives the host time to queue the call's kernels ahead of the device.
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in events) / calls / 1e3


def make_clock(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def time_in_turns(
    calls: dict[str, Callable[[], object]],
    clock: CpuClock | CudaClock,
    repeats: int,
    budget: float,
    rivals: frozenset[str] = frozenset(),
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Up to ``repeats`` samples of each call, round by round.

    A call leaves the rounds once its samples have taken ``budget`` seconds, but not before it has three. Of the
    ``rivals`` only the fastest matters: one that is HOPELESS times slower than that keeps a single sample.
    ``tick(name)`` is called before each sample.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    once = {}
    for name, call in calls.items():
        tick(name)
        once[name] = clock.sample(call, 1)
        if once[name] < 10 * MIN_SAMPLE:  # that was the warm-up
            once[name] = clock.sample(call, 1)
        else:  # long enough to need none: it counts
            samples[name].append(once[name])
    fastest = min((once[name] for name in rivals & set(calls)), default=0.0)
    hopeless = {name for name in rivals & set(calls) if once[name] > HOPELESS * fastest}
    for name in hopeless:
        samples[name] = [once[name]]
    per_sample = {name: max(1, min(1000, round(MIN_SAMPLE / max(once[name], 1e-9)))) for name in calls}
    spent = {name: sum(first) for name, first in samples.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            taken = len(samples[name])
            if name in hopeless or taken == repeats or (spent[name] > budget and taken >= MIN_SAMPLES):
                continue
            tick(name)
            seconds = clock.sample(call, per_sample[name])
            samples[name].append(seconds)
            spent[name] += seconds * per_sample[name]
    return {name: Timing(values, name in hopeless) for name, values in samples.items()}
