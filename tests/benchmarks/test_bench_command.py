"""The command, end to end."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import attn_bench
from benchmarks.candidates import Candidate
from benchmarks.problem import ORDERS
from benchmarks.record import Record
from benchmarks.suites import SUITES

ROOT = Path(attn_bench.__file__).resolve().parent.parent
SMOKE = ["--suite", "smoke", "--quiet", "--threads", "1", "--repeats", "1", "--budget", "0"]


def command(*arguments):
    run = [sys.executable, "-m", "benchmarks.attn_bench", *arguments]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)


def test_smoke_suite_end_to_end(tmp_path):
    result, figure = tmp_path / "result.json", tmp_path / "figure.png"
    names = "nat-16", "cifar-d2", "cross-256"  # one of each kind; test_bench_check has all shapes of the suite
    options = ["--peers", "naive,sdpa,natten", "--backend", "cpu", "--json", str(result), "--plot", str(figure)]
    done = command(*SMOKE, *options, *(word for name in names for word in ("--shape", name)))
    assert done.returncode == 0, done.stderr + done.stdout
    record = Record.read(result)
    assert {"torch", "cpu", "threads", "commit", "packages", "backends"} <= set(record.environment)
    assert (record.more["arguments"]["suite"], record.precision) == ("smoke", "float32")
    assert record.rates.fmas > 0
    rows = {(*row.cell, row.candidate): row for row in record.rows}
    shapes = [shape for shape in SUITES["smoke"] if shape.name in names]
    assert [shape.name for shape in shapes] == [*names] and {name for name, *_ in rows} == {*names}
    for shape in shapes:
        for order in ORDERS:
            naive = rows[shape.name, order, "naive"]
            assert naive.status == "ok"
            assert len(naive.timing.samples) == 1
            assert naive.memory.step > 0
            assert rows[shape.name, order, "sdpa-math"].status == rows[shape.name, order, "cpu"].status == "ok"
        assert "is not implemented" in rows[shape.name, "double", "sdpa"].reason or shape.table
        assert shape.name in done.stdout
    for row in rows.values():
        assert row.status == "ok" or (row.group == "peer" and row.reason)
    assert figure.stat().st_size > 10_000


def test_without_repeats_results_are_only_checked(tmp_path, capsys):
    arguments = ["--shape", "cifar-d2", "--order", "forward", "--peers", "naive", "--json", str(tmp_path / "x.json")]
    assert attn_bench.main([*SMOKE, "--repeats", "0", *arguments]) == 0
    assert {(row.order, row.status, row.timing, row.memory) for row in Record.read(tmp_path / "x.json").rows} == {
        ("forward", "ok", None, None)
    }
    assert "right, not timed" in capsys.readouterr().out


def test_a_wrong_backend_is_printed_and_fails(capsys):
    def prepare(shape, device, dtype):
        return lambda query, key, value, table: value * 0.5

    broken = Candidate("broken", "ours", prepare)
    arguments = [*SMOKE, "--shape", "cifar-d2", "--order", "forward", "--peers", "none", "--no-memory"]
    assert attn_bench.main(arguments, extra=(broken,)) == 1
    printed = capsys.readouterr()
    assert "broken         WRONG: output is off by" in printed.out
    assert "FAILED: broken on cifar-d2, forward" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "nat-7"], "--shape must be one of"),
        (["--backend", "abacus"], "--backend must be among"),
        (["--peers", "abacus"], "--peers must be among"),
        (["--repeats", "-1"], "--repeats must be at least 0, got -1"),
        (["--order", "third"], "invalid choice: 'third'"),
        (["--suite", "large"], "invalid choice: 'large'"),
        (["--json", ""], "argument --json: is '', which names nothing"),
        (["--plot", "benchmarks"], "argument --plot: must be a file, got the folder 'benchmarks'"),
        (["--json", "setup.py/out.json"], "is no folder to write to"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(Path(attn_bench.__file__).parents[1])
    try:
        status = attn_bench.main(["--suite", "smoke", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_named_shape_outside_the_suite_runs_as_it_is():
    options = attn_bench.parse(["--suite", "smoke", "--shape", "cifar-g1", "--shape", "nat-16"])
    assert [shape.describe() for shape in options.shapes] == ["128,8x8,4,256", "1,16x16,2,8"]


def test_defaults_by_suite():
    assert attn_bench.parse(["--suite", "smoke"]).shapes == SUITES["smoke"]
    assert attn_bench.parse(["--suite", "cpu"]).dtype == "float32"
    assert attn_bench.parse(["--suite", "cpu"]).device == "cpu"
    assert attn_bench.parse(["--suite", "smoke", "--dtype", "bfloat16"]).dtype == "bfloat16"
