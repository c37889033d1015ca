"""report.html: complete, right, and in need of nothing else."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gans.commands.cli import main
from gans.evaluation.report import training_seconds, write_report
from gans.training import logs
from gans.training.loop import train


@pytest.fixture
def plain_curves() -> None:
    """They are drawn here."""


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.sources, self.cells, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag in ("td", "th"):
            self.cells.append("")

        self.open = [*self.open, tag]

    def handle_endtag(self, tag):
        self.open = self.open[:-1]

    def handle_data(self, data):
        if {"td", "th"} & set(self.open[-2:]):
            self.cells[-1] += data.strip()


def test_a_run_writes_its_page(tiny, tiny_run):
    run = replace(tiny_run, metric_every=3, metric_images=20)
    out = Path(run.out)
    train(replace(tiny, steps=3), run, progress=False)
    train(tiny, replace(run, resume="latest", data="digits"), progress=False)
    text = (out / "report.html").read_text()
    page = Page(text)
    assert all(source.startswith("data:image/") for source in page.sources) and "http" not in re.sub(
        r"base64,\S+", "", text
    )
    pictures = [Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))) for s in page.sources if "image/png" in s]
    strip, (curves, grid) = pictures[:4], pictures[4:]
    assert [picture.size for picture in strip] == [(32, 8)] * 4  # three steps and real images
    last = np.asarray(Image.open(out / "samples" / "step-00000006.png"))
    assert np.array_equal(np.asarray(grid), last)
    assert np.array_equal(np.asarray(strip[2])[:, :8], last[:8, :8])
    assert np.array_equal(np.asarray(curves), np.asarray(Image.open(out / "curves.png")))
    value = dict(reversed([*pairwise(page.cells)]))
    assert value["steps"] == "6 of 6" and value["real images seen"] == "48" and value["lr_d"] == "0.001"
    assert value["generator.kind"] == "transgan" and value["run.log_every"] == "2"
    lines = logs.read(out)
    distances = [line for line in lines if "distance" in line]
    best = min(distances, key=lambda line: line["distance"])
    assert value["best distance"] == f"{best['distance']:.4g} at step {best['step']}"
    for line in distances:
        assert f"{line['distance']:.4g}" in page.cells and f"{line['distance'] / line['floor']:.3g}" in page.cells


def test_time_is_that_of_the_steps():
    lines = [{"real_images": 100, "images_per_second": 10.0}, {"real_images": 300, "images_per_second": 50.0}]
    assert training_seconds(lines) == pytest.approx(10 + 4)


def test_figures_writes_it_and_names_are_escaped(tiny, tiny_run, tmp_path):
    run = replace(tiny_run, out=str(tmp_path / "a<b>&c"))
    train(replace(tiny, steps=1), run, progress=False)
    assert main(["figures", "--run", run.out, "--out", str(tmp_path / "figures")]) == 0
    assert "<h1>a&lt;b&gt;&amp;c</h1>" in (tmp_path / "figures" / "report.html").read_text()
    for path in (tmp_path / "a<b>&c" / "samples").glob("step-*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has no samples to show"):
        write_report(Path(run.out), [], tmp_path / "curves.png", tmp_path / "x.html")
