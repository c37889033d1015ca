"""Random problems, and the sweep's figures."""

import itertools
from dataclasses import replace

import pytest
import torch

from benchmarks import sweep
from benchmarks.candidates import find_candidates
from benchmarks.floors import Rates
from benchmarks.problem import STEPS, make_inputs
from benchmarks.random_shapes import KINDS, is_quick, kind_of, random_shape
from benchmarks.record import Record, Row
from benchmarks.timing import Timing

RATES = Rates(1e11, 1e10, 1e10)


def test_a_problem_depends_on_its_seed_and_number_alone():
    found = [random_shape(0, number).describe() for number in range(4)]
    assert found == ["1,241,2,68", "1,17,4,121", "12,12x120,1,18", "4,110x42,13,12"]
    assert random_shape(1, 0) != random_shape(0, 0)


def test_random_problems_are_of_all_kinds_and_keep_their_ranges():
    shapes = [random_shape(0, number) for number in range(600)]
    assert [kind_of(shape) for shape in shapes[:8]] == [*KINDS, *KINDS]
    for shape in shapes:
        assert is_quick(shape)
        assert 1 <= shape.batch <= 32
        assert 16 <= shape.queries <= 8192
        assert 4 <= shape.head_dim <= 128
        assert 1 <= shape.heads <= 16
        if shape.kind == "grid":
            assert 4 <= shape.window <= 32
            assert all(length % shape.window == 0 for length in shape.size)
        elif shape.kind == "neighborhood":
            assert 3 <= shape.window <= 13
            assert all(shape.window * d <= min(shape.size) for d in shape.dilations)
    traits = {(shape.kind, shape.table, shape.tied, bool(shape.keys), len(shape.dilations)) for shape in shapes}
    maps = itertools.product(("neighborhood",), (False, True), (False,), (False,), (1, 2))
    assert {("full", False, False, True, 1), ("full", False, True, False, 1), ("grid", True, False, False, 1)} <= traits
    assert {("grid", False, False, False, 1), *maps} <= traits
    for name, (least, most) in {
        "batch": (1, 30),
        "heads": (1, 15),
        "head_dim": (4, 125),
        "queries": (16, 7000),
    }.items():
        found = [getattr(shape, name) for shape in shapes]
        assert min(found) <= least + 1
        assert max(found) >= most


@pytest.mark.parametrize("number", [3, 15, 23])  # with one dilation, without a table, with two
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_all_candidates_agree_with_and_without_a_table(number, order):
    shape = replace(random_shape(0, number), batch=1, size=(20, 18), dilations=(1,), heads=2)
    shape = replace(shape, dilations=(1, 2) if number == 23 else (1,), window=5)
    device = torch.device("cpu")
    candidates = find_candidates(device, torch.float64, ["cpu"], ("naive", "sdpa"))
    inputs = make_inputs(shape, torch.float64, device)
    results = {}
    for candidate in filter(lambda candidate: candidate.covers(shape), candidates):
        if not (candidate.name == "sdpa" and order == "backward" and shape.table):  # its kernel has no such gradient
            results[candidate.name] = STEPS[order](candidate.prepare(shape, device, torch.float64), inputs)
    assert {"cpu", "naive", "naive-mask", "naive-loop"} <= set(results)
    for name, values in results.items():
        for key, value in values.items():
            torch.testing.assert_close(value, results["naive"][key], msg=lambda text, name=name: f"{name}: {text}")


def record_of(times):
    """Ours takes one millisecond everywhere; ``times`` has milliseconds of naive and SDPA by problem and order."""
    words = dict.fromkeys(("cpu", "threads", "torch", "commit", "instruction_set"), "x")
    record = Record(words | dict.fromkeys(("modified", "load_average", "load_average_after"), 0), "float32")
    rows = []
    for (number, order), (naive, sdpa) in times.items():
        shape = random_shape(0, number)
        for name, group, milliseconds in (("cpu", "ours", 1), ("naive", "naive", naive), ("sdpa", "peer", sdpa)):
            if milliseconds is not None:
                rows.append(Row(shape, order, name, group, timing=Timing([1e-3 * milliseconds])))
    record.add(rows, RATES)
    return record


def test_summary_has_means_shares_and_the_worst_with_their_commands():
    times = {(0, "forward"): (2.0, 0.5), (4, "forward"): (8.0, 2.0), (2, "forward"): (0.5, 1.0)}
    record = record_of(times | {(0, "backward"): (3.0, None)})
    lines = sweep.summary(record, sweep.parse(["--threads", "2"]))
    table = {(words[0], words[1]): words[2:-1] for line in lines if (words := line.split()) and len(words) == 9}
    assert table["full", "forward"] == ["4.00", "2.00", "0.0%", "1.00", "0.50", "50.0%"]
    assert table["full", "backward"] == ["3.00", "3.00", "0.0%", "-", "-", "-"]
    assert table["grid", "forward"] == ["0.50", "0.50", "100.0%", "1.00", "1.00", "0.0%"]
    assert table["all", "forward"] == ["2.00", "0.50", "33.3%", "1.00", "0.50", "33.3%"]
    assert ("l2", "forward") not in table
    worst = lines.index("worst of naive / ours, of 4:") + 1
    assert lines[worst].split()[:2] == ["0.50", "1.000"]
    assert lines[worst + 1].strip() == "python -m benchmarks.sweep --seed 0 --problem 2 --order forward --threads 2"
    assert lines[worst + 2].split()[0] == "2.00"


def test_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "measure_rates", lambda device, dtype, samples: RATES)
    monkeypatch.setattr(sweep, "limit_memory", lambda: None)
    threads = torch.get_num_threads()
    try:
        common = ["--threads", "1", "--budget", "0", "--repeats", "1", "--quiet"]
        arguments = ["--problem", "4", "--problem", "15", "--check", "--json", str(tmp_path / "out.json")]
        assert sweep.main([*common, *arguments]) == 0
        record = Record.read(tmp_path / "out.json")
        assert {row.status for row in record.rows if row.group != "peer"} == {"ok"}
        assert set(record.cells) == {
            (name, order) for name in ("full-4", "neighborhood-15") for order in sweep.DEFAULT_ORDERS
        }
        assert len(sweep.ratios(record, "naive")) == 6
        assert "1 threads" in capsys.readouterr().out
        # Without a check, and without time: the first problem is done whole, and no other.
        assert (
            sweep.main([*common, "--minutes", "0", "--again", "1000", "--order", "forward", "--order", "backward"]) == 0
        )
        assert "1 problems of seed 0" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--problem", "-1"], "--problem must be at least 0, got -1"),
        (["--minutes", "-1"], "--minutes must be at least 0, got -1"),
        (["--problem", "1", "--kind", "grid"], "none among the problems"),
        (["--kind", "cube"], "invalid choice: 'cube'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
