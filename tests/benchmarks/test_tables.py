"""Tables of the docs are made from results, and are up to date; what is written is what is read."""

import json

import pytest

from benchmarks import plot, tables
from benchmarks.floors import Rates
from benchmarks.memory import Memory
from benchmarks.problem import ORDERS
from benchmarks.record import Record, Row
from benchmarks.shapes import SHAPES
from benchmarks.timing import Timing

CPU_RESULT = "benchmarks/results/cpu_epyc_2threads.json"
ENVIRONMENT = {"gpu": "NVIDIA H100", "commit": "0123456789abcdef", "date": "2026-11-30T10:00:00+00:00",
               "torch": "2.11.0+cu130", "packages": {"triton": "3.6.0"}}  # fmt: skip
STAGES = {
    "load": {"backends": ["triton", "cuda"]},
    "tests": {"found": {"triton": {"passed": 9, "skipped": 1}, "cuda": {"passed": 8, "failed": 1, "not run": 1}}},
    "sanitizer": {"found": {"cuda": {"memcheck errors": 0, "racecheck hazards": None}}},
}


def row(shape, order, candidate, group, seconds, **more):
    return Row(SHAPES[shape], order, candidate, group, timing=Timing([seconds] * 3), **more)


def record(date="2026-11-30", stages=STAGES, commit=ENVIRONMENT["commit"]):
    """cuda 1 ms, triton 1.5 ms, their operators alone half of that; a peer 6 ms, which can't do the double backward."""
    made = Record(
        {**ENVIRONMENT, "date": f"{date}T10:00:00+00:00", "commit": commit}, "bfloat16", more={"stages": stages}
    )
    rows = []
    for shape in ("nat-64", "nat-1024"):
        for order in ORDERS:
            for backend, seconds in (("triton", 1.5e-3), ("cuda", 1e-3)):
                alone = Timing([seconds / 2])
                rows.append(
                    row(shape, order, backend, "ours", seconds, alone=alone, memory=Memory(20, 100, 150), host=1e-4)
                )
            rows.append(row(shape, order, "naive", "naive", 6e-3, error=1e-3))
            if order == "double":
                rows.append(Row(SHAPES[shape], order, "flex", "peer", "cannot", "no derivative"))
            else:
                rows.append(row(shape, order, "flex", "peer", 4.5e-3))
    made.add(rows, Rates(4e14, 3.7e12, 3e12))
    return made


@pytest.fixture
def root(tmp_path):
    record().write(tmp_path / "gpu_h100.json")
    record("2026-11-29", commit="old").write(tmp_path / "gpu_old.json")
    return tmp_path


def test_what_is_written_is_what_is_read(tmp_path):
    made = record()
    made.write(tmp_path / "x.json")
    assert Record.read(tmp_path / "x.json") == made
    text = (tmp_path / "x.json").read_text()
    assert sum(line.startswith('{"shape"') for line in text.splitlines()) == len(made.rows)
    # Of many samples the quartiles are kept, and with them median and spread.
    many = Record(ENVIRONMENT, "bfloat16")
    many.add([row("nat-64", "forward", "cuda", "ours", 1.0)], made.rates)
    many.rows[0].timing = Timing([1.0, 9.0, 2.0, 4.0, 3.0, 7.0, 5.0, 8.0, 6.0])
    many.write(tmp_path / "x.json")
    read = Record.read(tmp_path / "x.json").rows[0].timing
    assert (read.samples, read.median, read.spread) == ([1, 3, 5, 7, 9], 5, many.rows[0].timing.spread)
    Record({}, "float32").write(tmp_path / "x.json")
    assert Record.read(tmp_path / "x.json").rows == []


def test_added_rows_replace_those_of_the_same_cell_and_are_related_anew():
    made = record()
    count = len(made.rows)
    made.add([row("nat-64", "forward", "naive", "naive", 2e-3)], Rates(1.0, 1e15, 1.0))
    assert len(made.rows) == count
    assert made.cells["nat-64", "forward"]["cuda"].ratio == pytest.approx(2)
    assert made.cells["nat-64", "backward"]["cuda"].ratio == pytest.approx(6)
    assert made.rates == Rates(4e14, 1e15, 3e12)


def page(*descriptions):
    return "\n".join(f"before\n<!-- table: {text} -->\nold\n<!-- end of table -->\nafter" for text in descriptions)


def test_the_pages_of_this_repository_are_up_to_date(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr()


def test_ratios_of_the_file_that_docs_show():
    data = json.loads((tables.ROOT / CPU_RESULT).read_text())
    times = {
        (r["candidate"], r["order"]): sorted(r["timing"])[len(r["timing"]) // 2] for r in data["rows"]
        if r["shape"] == "vitgan-d" and len(r.get("timing", ())) % 2
    }  # fmt: skip
    line = next(x for x in tables.make(f"speed {CPU_RESULT}").splitlines() if x.startswith("| vitgan-d ("))
    forward = line.split(" | ")[1].split(" / ")[0]
    assert forward == f"{times['naive', 'forward'] / times['cpu', 'forward']:.1f}"


def test_only_what_is_between_the_comments_changes(root):
    made = tables.rewrite(page("figures gpu_h100.json", "operators gpu_h100.json"), root)
    assert made.count("before\n<!-- table: ") == made.count("<!-- end of table -->\nafter") == 2
    assert "old" not in made
    assert "| met | triton | backward: FlexAttention / ours, least | >= 2 | 3.00x on nat-64, of 2 |" in made
    assert "| nat-64 | 8,64x64,16,32 | 750 (" in made
    assert tables.rewrite(made, root) == made


def test_what_has_run_on_a_gpu(root):
    lines = tables.make("ran gpu_*.json", root).splitlines()
    start = "0123456789 | NVIDIA H100 | 2026-11-30 | 2.11.0+cu130, 3.6.0"
    assert lines[2:] == [
        f"| `triton` | {start} | 9 passed, 1 skipped | not run | not run |",
        f"| `cuda` | {start} | 8 passed, 1 failed, 1 not run | not run | 0 memcheck errors, ? racecheck hazards |",
    ]
    # A second run at the same commit adds to the first.
    stages = {
        "load": {"backends": ["triton"]},
        "tests": {"status": "not run"},
        "repeat": {"found": {"triton": {"passed": 2}}},
    }
    record("2026-12-01", stages).write(root / "gpu_second.json")
    made = tables.make("ran gpu_*.json", root)
    assert "| 2026-12-01 | 2.11.0+cu130, 3.6.0 | 9 passed, 1 skipped | 2 passed | not run |" in made
    assert "| 8 passed, 1 failed, 1 not run | not run |" in made
    assert tables.make("ran nothing_*.json", root).count("not yet run on a GPU") == 2


def test_steps_beside_other_libraries(root):
    lines = tables.make("steps gpu_h100.json", root).splitlines()
    assert lines[0] == "| shape | step | ours, us | memory beyond / returned | fastest naive | flex |"
    assert lines[2] == "| nat-64 | forward | cuda 1000 | 0.20 | 6.0 | 4.5 |"
    assert lines[4] == "| nat-64 | double | cuda 1000 | 0.20 | 6.0 | - |"


def test_what_each_library_can_do():
    rows = [row("nat-16", order, "cpu", "ours", 1.0) for order in ORDERS]
    wrong = Row(SHAPES["nat-16"], "backward", "sdpa", "peer", "wrong", "off by 2")
    rows += [wrong, *(Row(SHAPES["nat-16"], order, "sdpa", "peer") for order in ORDERS if order != "backward")]
    rows += [Row(SHAPES["nat-16"], order, "flex", "peer", "cannot", "no CPU.") for order in ORDERS]
    assert tables.orders_table(Record({}, "float32", rows=rows)).splitlines()[2:] == [
        "| nat-16 (8, 16x16, 16, 32) | all | forward, double, tangent | no |",
        "",
        "- sdpa: off by 2 (backward)",
        "- flex: no CPU (forward, backward, double, tangent)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (page("dance gpu_h100.json"), "got 'dance'"),
        (page("figures gpu_*.json"), "'gpu_\\*.json' must be one file, it is 2"),
        (page("figures none.json"), "must be one file, it is 0"),
        (page("speed /none.json"), "relative to the repository, got '/none.json'"),
        (page("penalty-curves gpu_h100.json"), "no result of benchmarks.penalty_study"),
        ("<!-- table: ran x.json -->\nno end", "has no '<!-- end of table -->'"),
    ],
)
def test_comments_that_make_no_sense(root, text, message):
    with pytest.raises(ValueError, match=message):
        tables.rewrite(text, root)


def test_check_changes_nothing(tmp_path, capsys):
    stale = tmp_path / "page.md"
    stale.write_text(page(f"speed {CPU_RESULT}"))
    before = stale.read_text()
    assert tables.main(["--check", str(stale)]) == 1
    assert (stale.read_text(), "out of date" in capsys.readouterr().out) == (before, True)
    assert tables.main([str(stale)]) == 0
    assert "| nat-16 (" in stale.read_text()
    assert tables.main(["--check", str(stale)]) == 0
    stale.write_text(page("figures none.json"))
    assert tables.main([str(stale)]) == 2


def test_files_that_are_not_there_or_no_results(tmp_path, capsys):
    assert tables.main([str(tmp_path / "none.md")]) == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"rows": []}')
    Record({}, "float32").write(tmp_path / "empty.json")
    messages = {
        "none.json": "No such file",
        "other.json": "other.json is no result of a benchmark",
        "empty.json": "has no times to draw",
    }
    for result, message in messages.items():
        with pytest.raises(SystemExit) as stop:
            plot.main([str(tmp_path / result), str(tmp_path / "figure.png")])
        assert (stop.value.code, message in capsys.readouterr().err) == (2, True)
