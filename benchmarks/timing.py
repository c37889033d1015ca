"""Times of several candidates, taken in turns so that a machine's drift and noise fall on all of them alike."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from weakref import WeakKeyDictionary

import torch

LONG = 0.2  # seconds; calls from here on are timed without a warm-up
MIN_SAMPLES = 3
HOPELESS = 3.0
OTHERS_SHARE = 0.25


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

    min_sample = 0.02  # seconds; shorter calls are repeated within a sample

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def settle(self, call: Callable[[], object], warm: bool) -> None:
        """What comes before a sample, untimed: a call's own memory must be warm, and nobody else's its business.

        glibc gives memory back when more is free than it likes, so the next candidate's first call would unmap what
        the last one left, which takes up to 0.3 s per GiB.
        """
        if self._trim is not None:
            self._trim(0)
        if warm:
            call()

    def sample(self, call: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """Device time per call by events, with the L2 cache filled with other data before each call.

    The device sleeps before each call for as long as the host takes to queue it, so that the host runs ahead and the
    time between the events holds no waiting for Python. ``host`` is that queueing time, in seconds per call.
    """

    min_sample = 0.0  # events tell single calls apart
    MAX_LEAD = 0.02  # seconds

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host: WeakKeyDictionary[Callable[[], object], float] = WeakKeyDictionary()
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.other_data = torch.zeros(max(2 * l2_bytes, 1 << 27) // 4, device=device)
        self.cycles_per_second = 1e9
        for _ in range(2):  # the first loads the kernel
            slept = self._between(lambda: self._sleep(1e-3))
        self.cycles_per_second *= 1e-3 / slept

    def settle(self, call: Callable[[], object], warm: bool) -> None:
        """Nothing: the device's memory is torch's, and every sample has a lead."""

    def sample(self, call: Callable[[], object], calls: int) -> float:
        return sum(self._one(call) for _ in range(calls)) / calls

    def _one(self, call: Callable[[], object]) -> float:
        self.other_data.sum()  # reads only: written lines would be flushed during the call, at its expense
        lead = self.host.get(call)
        if lead is None:
            torch.cuda.synchronize(self.device)
        else:
            self._sleep(min(1.3 * lead + 2e-5, self.MAX_LEAD))
        queued = 0.0

        def timed() -> None:
            nonlocal queued
            begin = time.perf_counter()
            call()
            queued = time.perf_counter() - begin

        seconds = self._between(timed)
        self.host[call] = queued if lead is None else min(lead, queued)
        return seconds

    def _between(self, work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3

    def _sleep(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self.cycles_per_second))


def make_clock(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def time_in_turns(
    calls: dict[str, Callable[[], object]],
    clock: CpuClock | CudaClock,
    repeats: int,
    budget: float,
    rivals: frozenset[str] = frozenset(),
    others: frozenset[str] = frozenset(),
    tick: Callable[[str], None] = lambda name: None,
    already: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Timing]:
    """Up to ``repeats`` samples of each call, round by round.

    A call leaves the rounds once its samples have taken ``budget`` seconds, but not before it has three. ``rivals``
    and ``others`` get OTHERS_SHARE of that time, and one sample may do; but the fastest of the rivals, which alone
    matters, needs two, and one that is HOPELESS times slower gets no second. ``tick(name)`` is called before each
    sample. ``already`` holds the seconds that some calls took just before: if LONG, they are a first sample, else they
    were the warm-up.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    once = {}
    for name, call in calls.items():
        tick(name)
        clock.settle(call, False)
        once[name] = already[name] if name in already else clock.sample(call, 1)
        if once[name] < LONG:  # that was the warm-up
            once[name] = clock.sample(call, 1)
        else:  # long enough to need none: it counts
            samples[name].append(once[name])
    fastest = min(rivals & set(calls), key=once.__getitem__, default=None)
    hopeless = {name for name in rivals & set(calls) if once[name] > HOPELESS * once[fastest]}
    for name in hopeless:
        samples[name] = [once[name]]
    least = dict.fromkeys(calls, MIN_SAMPLES) | dict.fromkeys(others | rivals, 1) | {fastest: 2}
    seconds = dict.fromkeys(calls, budget) | dict.fromkeys(others | rivals, OTHERS_SHARE * budget)
    per_sample = {name: max(1, min(1000, round(clock.min_sample / max(once[name], 1e-9)))) for name in calls}
    spent = {name: sum(first) for name, first in samples.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            taken = len(samples[name])
            enough = spent[name] > seconds[name] and taken >= least[name]
            if name in hopeless or taken == repeats or enough:
                continue
            tick(name)
            begin = time.perf_counter()
            clock.settle(call, once[name] < LONG)
            samples[name].append(clock.sample(call, per_sample[name]))
            spent[name] += max(samples[name][-1] * per_sample[name], time.perf_counter() - begin)
    return {name: Timing(values, name in hopeless) for name, values in samples.items()}
