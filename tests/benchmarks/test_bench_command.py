"""The command, end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import attn_bench
from benchmarks.candidates import Candidate
from benchmarks.problem import ORDERS
from benchmarks.suites import SUITES

ROOT = Path(attn_bench.__file__).resolve().parent.parent
SMOKE = ["--suite", "smoke", "--quiet", "--threads", "1", "--repeats", "1", "--budget", "0"]


def command(*arguments, module=True):
    entry = ["-m", "benchmarks.attn_bench"] if module else ["benchmarks/attn_bench.py"]
    return subprocess.run([sys.executable, *entry, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_smoke_suite_end_to_end(tmp_path):
    result, figure = tmp_path / "result.json", tmp_path / "figure.png"
    done = command(*SMOKE, "--peers", "naive,sdpa,natten", "--json", str(result), "--plot", str(figure))
    assert done.returncode == 0, done.stderr + done.stdout
    document = json.loads(result.read_text())
    assert {"torch", "cpu", "threads", "commit", "packages", "backends"} <= set(document["environment"])
    assert document["arguments"]["suite"] == "smoke"
    assert set(document["rates"]) == {"fmas", "exps", "bytes"}
    rows = {(row["shape"], row["order"], row["candidate"]): row for row in document["rows"]}
    for shape in SUITES["smoke"]:
        for order in ORDERS:
            naive = rows[shape.name, order, "naive"]
            assert naive["status"] == "ok"
            assert len(naive["samples"]) == naive["sample_count"] == 1
            assert naive["memory"]["step"] > 0
            assert rows[shape.name, order, "sdpa-math"]["status"] == "ok"
        assert "is not implemented" in rows[shape.name, "double", "sdpa"]["reason"] or shape.table
        assert shape.name in done.stdout
    for row in rows.values():
        assert row["status"] == "ok" or (row["group"] == "peer" and row["reason"])
        if row["group"] == "ours":
            assert row["status"] == "ok"
    assert figure.stat().st_size > 10_000


def test_runs_as_a_file():
    done = command(*SMOKE, "--shape", "cifar-d2", "--order", "forward", "--peers", "naive", "--no-memory", module=False)
    assert done.returncode == 0, done.stderr
    assert "cifar-d2" in done.stdout
    assert "backward" not in done.stdout.split("cifar-d2")[1]


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
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--order", "third"], "invalid choice: 'third'"),
        (["--suite", "large"], "invalid choice: 'large'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
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
    assert attn_bench.parse(["--suite", "cpu"]).dtype == "float32"
    assert attn_bench.parse(["--suite", "cpu"]).device == "cpu"
    assert attn_bench.parse(["--suite", "smoke", "--dtype", "bfloat16"]).dtype == "bfloat16"
