"""The figures to reach on a GPU and the page, from made-up rows."""

import json

import pytest
from made_up import document, row, rows

from benchmarks.gpu.document import Document
from benchmarks.gpu.figures import figures_to_reach
from benchmarks.gpu.markdown import page
from benchmarks.shapes import SHAPES


def by_name(made_rows):
    return {(figure.backend, figure.name): figure for figure in figures_to_reach(made_rows)}


SHARE = ("triton", "forward, percent of the floor, nat-128 to nat-1024, least")
FLEX = ("triton", "forward + backward: FlexAttention / ours, neighborhoods, least")
MATH = ("triton", "double backward alone: SDPA MATH / ours, all named shapes, least")
MEMORY = ("triton", "double backward alone: memory beyond inputs and outputs / outputs, largest")
OVER = ("cuda", "triton / cuda, every named shape and order, least")
NATTEN = ("cuda", "NATTEN's fastest kernels (without the table) / cuda, whole layer, least")


def test_everything_met():
    figures = by_name(rows())
    assert all(figure.met for figure in figures.values()), [f for f in figures.values() if not f.met]
    assert len(figures) == 16
    assert figures[SHARE].text == "70% on nat-128; geometric mean 70% of 4"
    assert figures[FLEX].value == pytest.approx(3)
    assert figures[MATH].value == pytest.approx(20 / 1.5)
    assert figures[OVER].value == pytest.approx(1.5)
    assert figures[NATTEN].value == pytest.approx(4)


def test_one_slow_shape_is_a_miss():
    made = rows()
    for entry in made:
        if (entry["shape"], entry["order"], entry["candidate"]) == ("nat-512", "forward", "triton"):
            entry["alone_percent"] = 59.0
        if (entry["shape"], entry["candidate"], entry["order"]) == ("church-g6", "triton", "double"):
            entry["memory"] = {"ratio": 0.3}
            entry["alone"] = 1.3e-3
    figures = by_name(made)
    assert (figures[SHARE].met, figures[SHARE].value) == (False, 59.0)
    assert "59% on nat-512" in figures[SHARE].text
    assert (figures[MEMORY].met, figures[MEMORY].text) == (False, f"0.30 on church-g6, of {len(SHAPES)} shapes")
    assert figures[MATH].met is False and "7.69x on church-g6" in figures[MATH].text


def test_met_on_some_shapes_is_not_met_but_a_miss_on_some_is_a_miss():
    some = [entry for entry in rows() if entry["shape"] != "nat-1024"]
    figure = by_name(some)[SHARE]
    assert (figure.met, figure.value) == (None, 70.0)
    assert figure.text.endswith("of 3 (of 4 wanted)")
    for entry in some:
        entry["alone_percent"] = 10.0
    assert by_name(some)[SHARE].met is False


def test_nothing_measured():
    assert {figure.met for figure in figures_to_reach([])} == {None}


def test_other_precisions_do_not_count():
    assert {figure.met for figure in figures_to_reach({**r, "precision": "float16"} for r in rows())} == {None}


def test_ratios_compare_within_a_pass():
    """What compiles is timed in a second pass, beside our backends again."""
    made = [
        row("nat-16", "backward", "triton", "ours", 1e-3),
        row("nat-16", "backward", "triton", "ours", 2e-3, which="compiled"),
        row("nat-16", "backward", "flex", "peer", 5e-3, which="compiled"),
    ]
    assert by_name(made)[FLEX].value == pytest.approx(2.5)


def test_the_page_tells_what_is_wrong_and_what_did_not_run():
    data = document(
        [*rows(), row("nat-8", "forward", "cuda", "ours", None, "float16", status="wrong", reason="off by 1")]
    )
    text = page(data)
    assert "| GPU | NVIDIA H100 |" in text
    assert "- tests: tests/x.py::test_y: no" in text
    assert "- benchmark: cuda on nat-8, float16, forward: wrong: off by 1" in text
    assert "- nat-8, tf32, compiled" in text
    assert (
        "| nat-256 | 8,256x256,4,32 | 750 (70%) / 750 (50%) / 750 (40%) | 500 (80%) / 500 (65%) / 500 (55%) |" in text
    )
    assert "| nat-256 | backward | cuda 1000 | 0.20 | 6.0 | 6.0 | 20.0 | 4.5 | 4.0 |" in text
    assert "did not end" not in text
    assert "did not end" in page({**data, "finished": False})


def test_the_document_holds_figures_and_one_line_per_row(tmp_path):
    made = Document(tmp_path, commit="abc")
    made.data["rows"] = rows()
    made.save()
    text = (tmp_path / "gpu_check.json").read_text()
    assert json.loads(text)["rows"] == rows()
    assert sum(line.startswith('{"order"') for line in text.splitlines()) == len(rows())
    assert {figure["met"] for figure in json.loads(text)["figures"]} == {True}
