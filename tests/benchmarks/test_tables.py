"""Tables of the docs are made from results, and are up to date."""

import json

import pytest
from made_up import document

from benchmarks import tables
from benchmarks.gpu.figures import figures_to_reach
from benchmarks.shapes import SHAPES

CPU_RESULT = "benchmarks/results/cpu_epyc_2threads.json"


@pytest.fixture
def root(tmp_path):
    data = document()
    data["figures"] = [vars(figure) for figure in figures_to_reach(data["rows"])]
    (tmp_path / "gpu_h100.json").write_text(json.dumps(data))
    older = {**data, "commit": "old", "environment": {**data["environment"], "date": "2026-11-29T10:00:00+00:00"}}
    (tmp_path / "gpu_old.json").write_text(json.dumps(older))
    return tmp_path


def page(*descriptions):
    return "\n".join(f"before\n<!-- table: {text} -->\nold\n<!-- end of table -->\nafter" for text in descriptions)


def test_the_pages_of_this_repository_are_up_to_date(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr()


def test_the_table_of_the_readme():
    data = json.loads((tables.ROOT / CPU_RESULT).read_text())
    first = data["rows"][0]
    line = next(line for line in tables.cpu_speed(data).splitlines() if line.startswith(f"| {first['shape']} ("))
    ratios = [f"{r['ratio']:.1f}" for r in data["rows"] if (r["shape"], r["candidate"]) == (first["shape"], "cpu")]
    assert line.split(" | ")[1] == " / ".join(ratios)


def test_only_what_is_between_the_comments_changes(root):
    made = tables.rewrite(page("gpu-figures gpu_h100.json", "gpu-speed gpu_h100.json bfloat16"), root)
    assert made.count("before\n<!-- table: ") == made.count("<!-- end of table -->\nafter") == 2
    assert "old" not in made
    assert "| met | triton | forward, percent of the floor, nat-128 to nat-1024, least | >= 60 | 70% on nat-128" in made
    assert tables.rewrite(made, root) == made


def test_what_has_run_on_a_gpu(root):
    lines = tables.make("gpu-ran gpu_*.json", root).splitlines()
    assert lines[2:] == [
        "| `triton` | 0123456789 | NVIDIA H100 | 2026-11-30 | 2.11.0+cu130, 3.6.0 | 9 passed, 1 skipped | 1 ok"
        " | not run | memcheck 0, racecheck 2 |",
        "| `cuda` | 0123456789 | NVIDIA H100 | 2026-11-30 | 2.11.0+cu130, 3.6.0 | 8 passed, 1 failed, 1 not run"
        " | 0 ok, **1 failed** | not run | memcheck ? |",
    ]
    # A second run at the same commit adds to the first.
    second = {**json.loads((root / "gpu_h100.json").read_text()), "parts": {
        "environment": {"status": "ok", "backends": ["triton", "cuda"]}, "tests": {"status": "not run"},
        "capture": {"status": "ok", "results": [["graphs", "triton", "bfloat16", "nat-16", "ok", ""]] * 2},
    }}  # fmt: skip
    second["environment"]["date"] = "2026-12-01T10:00:00+00:00"
    (root / "gpu_second.json").write_text(json.dumps(second))
    assert "| 2026-12-01 | 2.11.0+cu130, 3.6.0 | 9 passed, 1 skipped | 1 ok | 2 ok |" in tables.make(
        "gpu-ran gpu_*.json", root
    )
    never = tables.make("gpu-ran nothing_*.json", root)
    assert never.count("not yet run on a GPU") == 2


def test_peers(root):
    line = next(
        x for x in tables.make("gpu-peers gpu_h100.json bfloat16", root).splitlines() if "| nat-64 | double" in x
    )
    assert line == "| nat-64 | double | cuda 1000 | 0.20 | 6.0 | - | 20.0 | - | - |"


def test_what_each_library_can_do():
    def row(candidate, order, status, reason=""):
        made = {"shape": "nat-16", "candidate": candidate, "order": order, "status": status, "reason": reason}
        return {**made, "group": "ours" if candidate == "cpu" else "peer", "problem": SHAPES["nat-16"].to_dict()}

    rows = [row("cpu", order, "ok") for order in tables.ORDERS]
    rows += [row("sdpa", "forward", "ok"), row("sdpa", "backward", "wrong", "off by 2"), row("sdpa", "double", "ok")]
    rows += [row("flex", order, "cannot", "no CPU.") for order in tables.ORDERS]
    assert tables.cpu_peers({"rows": rows}).splitlines()[2:] == [
        "| nat-16 (8, 16x16, 16, 32) | all | forward, double | no |",
        "",
        "- sdpa: off by 2 (backward)",
        "- flex: no CPU (forward, backward, double)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (page("gpu-dance gpu_h100.json"), "got 'gpu-dance'"),
        (page("gpu-figures gpu_*.json"), "'gpu_\\*.json' must be one file, it is 2"),
        (page("gpu-figures none.json"), "must be one file, it is 0"),
        ("<!-- table: gpu-ran x.json -->\nno end", "has no '<!-- end of table -->'"),
    ],
)
def test_comments_that_make_no_sense(root, text, message):
    with pytest.raises(ValueError, match=message):
        tables.rewrite(text, root)


def test_check_changes_nothing(tmp_path, capsys):
    stale = tmp_path / "page.md"
    stale.write_text(page(f"cpu-speed {CPU_RESULT}"))
    before = stale.read_text()
    assert tables.main(["--check", str(stale)]) == 1
    assert (stale.read_text(), "out of date" in capsys.readouterr().out) == (before, True)
    assert tables.main([str(stale)]) == 0
    assert "| nat-16 (" in stale.read_text()
    assert tables.main(["--check", str(stale)]) == 0
    stale.write_text(page("gpu-figures none.json"))
    assert tables.main([str(stale)]) == 2
