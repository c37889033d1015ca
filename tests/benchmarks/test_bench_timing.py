"""Times taken in turns, and the clock of a device."""

import types

import pytest
import torch

from benchmarks.timing import CpuClock, CudaClock, Timing, time_in_turns


def test_candidates_take_turns():
    order = []

    class Clock(CpuClock):
        def sample(self, call, calls):
            call()
            return 1.0

    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = time_in_turns(calls, Clock(), repeats=3, budget=10)
    assert "".join(order) == "ababab"
    assert timings["a"].samples == [1.0] * 3


def test_a_hopeless_rival_is_timed_once():
    class Clock(CpuClock):
        def sample(self, call, calls):
            return call()

    calls = {"ours": lambda: 0.01, "slow": lambda: 4.0, "slower": lambda: 5.0, "hopeless": lambda: 13.0}
    timings = time_in_turns(calls, Clock(), 5, 100, rivals=frozenset({"slow", "slower", "hopeless"}))
    samples = {name: len(timing.samples) for name, timing in timings.items()}
    assert samples == {"ours": 5, "slow": 5, "slower": 5, "hopeless": 1}
    assert [name for name, timing in timings.items() if timing.hopeless] == ["hopeless"]


def test_short_calls_are_repeated_within_a_sample():
    counts = []

    class Clock(CpuClock):
        def sample(self, call, calls):
            counts.append(calls)
            return 0.001

    time_in_turns({"short": lambda: None}, Clock(), repeats=1, budget=1)
    assert counts == [1, 1, 20]  # warm-up, calibration, 20 ms


def test_a_slow_candidate_leaves_after_three_samples():
    class Clock(CpuClock):
        def sample(self, call, calls):
            return call()

    timings = time_in_turns({"slow": lambda: 5.0, "fast": lambda: 0.1}, Clock(), repeats=6, budget=4)
    assert [len(timings[name].samples) for name in ("slow", "fast")] == [3, 6]


def test_one_sample_of_a_slow_call_is_enough_but_of_ours_and_the_fastest_rival():
    class Clock(CpuClock):
        def sample(self, call, calls):
            return call()

    calls = {"ours": lambda: 1.1, "rival": lambda: 2.0, "slow": lambda: 5.0, "peer": lambda: 3.0, "quick": lambda: 0.1}
    rivals, others = frozenset({"rival", "slow"}), frozenset({"peer", "quick"})
    timings = time_in_turns(calls, Clock(), 5, budget=1, rivals=rivals, others=others)
    samples = {name: len(timing.samples) for name, timing in timings.items()}
    assert samples == {"ours": 3, "rival": 2, "slow": 1, "peer": 1, "quick": 3}


def test_a_long_call_that_was_timed_when_checked_is_a_sample():
    class Clock(CpuClock):
        def sample(self, call, calls):
            return call()

    calls = {"long": lambda: 2.0, "short": lambda: 0.1}
    timings = time_in_turns(calls, Clock(), 3, budget=10, already={"long": 5.0, "short": 0.19})
    assert {name: timing.samples for name, timing in timings.items()} == {"long": [5.0, 2.0, 2.0], "short": [0.1] * 3}


def test_spread_is_half_the_distance_of_the_quartiles():
    assert Timing([1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(1 / 3)
    assert Timing([2.0]).spread == 0.0


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
