"""The figures to reach, from made-up rows, and the printed table."""

import pytest

from benchmarks.figures import figures_block, figures_to_reach
from benchmarks.floors import Rates
from benchmarks.memory import Memory
from benchmarks.record import Record, Row
from benchmarks.report import heading, order_block
from benchmarks.shapes import SHAPES
from benchmarks.timing import Timing

RATES = Rates(1e10, 1e9, 1e10)


def row(shape, order, candidate, group, seconds=1.0, **more):
    return Row(SHAPES[shape], order, candidate, group, timing=Timing([seconds] * 3), **more)


def figures_of(rows, precision="float32", environment=None, rates=RATES):
    record = Record(environment or {}, precision)
    record.add(rows, rates)
    return {figure.name: figure for figure in figures_to_reach(record)}


@pytest.fixture
def rows():
    made = []
    for order, ratios in (("forward", (4.0, 9.0)), ("backward", (2.0, 8.0)), ("double", (1.2, 10.0))):
        for shape, ratio in zip(("full-1k", "nat-16"), ratios, strict=True):
            beyond = 30 if (order, shape) == ("double", "nat-16") else 10
            made.append(row(shape, order, "cpu", "ours", 1 / ratio, memory=Memory(beyond, 100, 200)))
            made.append(row(shape, order, "naive", "naive", 1.0, memory=Memory(700, 100, 900)))
    return [*made, row("full-1k", "forward", "sdpa", "peer", 0.2), row("full-1k", "forward", "sdpa-math", "peer", 0.1)]


def test_figures_to_reach_on_a_cpu(rows):
    figures = figures_of(rows)
    mean = figures["forward: naive / ours, geometric mean"]
    assert (mean.value, mean.met) == (pytest.approx(6.0), True)
    assert mean.text == "6.00x of 2 shapes; 6.00x against the reference backend alone"
    assert figures["backward: naive / ours, geometric mean"].met is False
    least = figures["double: naive / ours, least"]
    assert (least.value, least.met, least.text) == (pytest.approx(1.2), False, "1.20x on full-1k, of 2")
    sdpa = figures["forward: fused SDPA / ours on full-1k"]
    assert (sdpa.value, sdpa.met) == (pytest.approx(0.8), False)
    assert figures["backward: fused SDPA / ours on full-1k"].met is None
    memory = figures["double: memory beyond / returned, largest"]
    assert (memory.value, memory.met, memory.text) == (
        pytest.approx(0.3),
        False,
        "0.30 on nat-16, of 2; naive 7.0 to 7.0",
    )
    share = figures["forward: percent of the FMA peak, nat-16 to nat-512, least"]
    fmas = 8 * 16 * 256 * 49 * 32 * 2
    assert share.value == pytest.approx(100 * fmas / RATES.fmas / (1 / 9))


H100 = {"gpu": "H100"}
FLOOR = "double backward alone: percent of the floor, nat-128 to nat-512, least"


def on_a_gpu(percent=(50, 60, 70), **more):
    """cuda on the shapes of the goal, its double backward at these percentages of the floor; then other libraries."""
    fast = Rates(1e30, 1e30, 1e12)
    probe = [row(name, "double", "cuda", "ours", alone=Timing([1.0])) for name in ("nat-128", "nat-256", "nat-512")]
    Record({}, "bfloat16").add(probe, fast)
    rows = [
        row(r.shape.name, "double", "cuda", "ours", 1e-3, alone=Timing([r.alone_percent / share]))
        for r, share in zip(probe, percent, strict=False)
    ]
    return figures_of([*rows, *more.get("rows", ())], "bfloat16", H100, fast)


def test_figures_to_reach_on_a_gpu():
    floor = on_a_gpu()[FLOOR]
    assert (floor.value, floor.met) == (pytest.approx(50), True)
    assert floor.text == "nat-128 50%, nat-256 60%, nat-512 70%"
    assert on_a_gpu((50, 44, 70))[FLOOR].met is False
    # Met on some of the shapes is not met, a miss on some is one.
    assert (on_a_gpu((50, 60))[FLOOR].met, on_a_gpu((50, 60))[FLOOR].value) == (None, pytest.approx(50))
    assert on_a_gpu((50, 10))[FLOOR].met is False
    peers = [
        row("nat-64", "forward", "triton", "ours", 1e-3), row("nat-64", "forward", "naive", "naive", 0.9e-3),
        row("nat-64", "forward", "natten-cutlass", "peer", 4e-3),
        row("nat-64", "forward", "natten-hopper", "peer", 2e-3),
        row("nat-64", "double", "triton", "ours", 1e-3, alone=Timing([1e-3])),
        row("nat-64", "double", "sdpa-math", "peer", 1e-3, alone=Timing([9e-3])),
    ]  # fmt: skip
    figures = on_a_gpu(rows=peers)
    assert figures["forward: NATTEN (without the table) / ours, least"].text == "2.00x on nat-64, of 1"
    assert figures["forward: naive / ours, least"].met is False
    math = figures["double backward alone: SDPA MATH / ours, least"]
    assert (math.value, math.met) == (pytest.approx(9), True)


def test_figures_are_about_one_precision_and_ours():
    assert figures_of([row("nat-64", "forward", "cuda", "ours")], "float16", H100) == {}
    assert figures_of([row("full-1k", "forward", "naive", "naive")]) == {}


def test_figures_are_printed_as_met_or_missed(rows):
    lines = figures_block(list(figures_of(rows).values())).splitlines()
    assert any(line.split()[0] == "met" and "geometric mean" in line for line in lines)
    assert any(line.split()[0] == "MISSED" and "double: naive / ours, least" in line for line in lines)
    assert not any("not measured" in line for line in lines)


def test_block_says_what_cannot_and_what_is_wrong():
    rows = [
        Row(SHAPES["vitgan-d"], "double", "sdpa", "peer", status="cannot", reason="no derivative"),
        Row(SHAPES["vitgan-d"], "double", "cpu", "ours", status="wrong", reason="output is off"),
    ]
    assert "sdpa           cannot: no derivative" in order_block(rows)
    assert "cpu            WRONG: output is off" in order_block(rows)
    assert "128,65,6,64  full attention, l2, tied, no table  [as it is]" in heading(SHAPES["vitgan-d"])
