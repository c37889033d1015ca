"""The figures to reach, from made-up rows."""

from dataclasses import replace

import pytest

from benchmarks.figures import figures_block
from benchmarks.memory import Memory
from benchmarks.report import figures_to_reach, shape_block
from benchmarks.runner import Row
from benchmarks.shapes import SHAPES
from benchmarks.timing import CpuClock, Timing, time_in_turns


def row(shape, order, candidate, group, seconds=1.0, ratio=None, **more):
    return Row(SHAPES[shape], order, candidate, group, timing=Timing([seconds] * 3), ratio=ratio, **more)


@pytest.fixture
def rows():
    made = []
    for order, ratios in (("forward", (4.0, 9.0)), ("backward", (2.0, 8.0)), ("double", (1.2, 10.0))):
        for shape, ratio in zip(("full-1k", "nat-16"), ratios, strict=True):
            memory = Memory(beyond=10, returned=100, step=200)
            made.append(row(shape, order, "cpu", "ours", 1 / ratio, ratio, memory=memory, fma_percent=10 * ratio))
            naive = Memory(beyond=700, returned=100, step=900)
            made.append(row(shape, order, "naive", "naive", 1.0, 1.0, memory=naive))
    made.append(row("full-1k", "forward", "sdpa", "peer", 0.2))
    made[-3] = replace(made[-3], memory=Memory(beyond=30, returned=100, step=200))
    return made


def test_figures_to_reach(rows):
    figures = {figure.name: figure for figure in figures_to_reach(rows)}
    mean = figures["forward: naive / ours, geometric mean"]
    assert (mean.value, mean.met) == (pytest.approx(6.0), True)
    assert figures["backward: naive / ours, geometric mean"].met is False
    least = figures["double: naive / ours, least"]
    assert (least.value, least.met, least.text) == (pytest.approx(1.2), False, "1.20x on full-1k")
    sdpa = figures["forward: fused SDPA / ours on full-1k"]
    assert (sdpa.value, sdpa.met) == (pytest.approx(0.8), False)
    assert "double: fused SDPA / ours on full-1k" not in figures
    share = figures["neighborhood forward, percent of the FMA peak, least"]
    assert (share.value, share.met) == (pytest.approx(90), True)
    memory = figures["double: memory beyond / returned, largest"]
    assert (memory.value, memory.met) == (pytest.approx(0.3), False)
    assert "naive 7.0 to 7.0" in memory.text


def test_figures_are_printed_as_met_or_missed(rows):
    lines = figures_block(figures_to_reach(rows)).splitlines()
    assert any(line.split()[0] == "met" and "geometric mean" in line for line in lines)
    assert any(line.split()[0] == "MISSED" and "double: naive / ours, least" in line for line in lines)


def test_a_shape_without_ours_has_no_figures():
    assert figures_to_reach([row("full-1k", "forward", "naive", "naive", 1.0, 1.0)]) == []


def test_block_says_what_cannot_and_what_is_wrong():
    rows = [
        Row(SHAPES["vitgan-d"], "double", "sdpa", "peer", status="cannot", reason="no derivative"),
        Row(SHAPES["vitgan-d"], "double", "cpu", "ours", status="wrong", reason="output is off"),
    ]
    text = shape_block(SHAPES["vitgan-d"], rows)
    assert "sdpa           cannot: no derivative" in text
    assert "cpu            WRONG: output is off" in text
    assert "128,65,6,64  full attention, l2, tied, no table  [as it is]" in text


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
