from __future__ import annotations

import runpy
import sys
from dataclasses import replace

import pytest
from PIL import Image

from gans.commands import demo
from gans.evaluation import plots
from gans.training.profile import StepCost, measure, measure_apart


def test_demo_in_two_steps(tmp_path, monkeypatch, capsys):
    small = {"backend": "reference", "seconds": 2.0, "peak_mib": 300.0}
    costs = [StepCost(**small), StepCost(**(small | {"seconds": 8.0, "peak_mib": 900.0}))]
    monkeypatch.setattr(demo, "compare", lambda *arguments, **options: costs)
    monkeypatch.setattr(demo, "DIGITS", replace(demo.DIGITS, batch_d=2, batch_g=2, n_critic=1))
    monkeypatch.setattr(demo, "METRIC_IMAGES", 100)
    status = demo.run(["--out", str(tmp_path), "--steps", "2", "--device", "cpu"])
    assert status == 1  # two steps do not make the distance fall, and the demo says so
    out = capsys.readouterr().out
    assert "2 steps on cpu, attention backend cpu\n" in out
    assert "NOT the 5 times" in out
    report = (tmp_path / "report.md").read_text()
    assert "| naive / fused | | 4.0 | 3.0 |" in report
    for name in ("samples.png", "curves.png"):
        assert Image.open(tmp_path / name).size[0] > 400


def test_step_cost_of_a_fresh_process(tiny):
    cost = measure_apart(tiny, backend="reference", device="cpu", update="discriminator", threads=1, repeats=1)
    assert cost.backend == "reference"
    assert 0 < cost.seconds < 60
    assert 0 <= cost.peak_mib < 2000
    automatic = measure(tiny, backend="auto", device="cpu", update="discriminator", repeats=1)
    assert automatic.backend == "cpu"  # by the name of what ran


def test_the_demo_is_a_module_and_a_command(monkeypatch, capsys):
    for module, arguments in (("gans.demo", ["--help"]), ("gans", ["demo", "--help"])):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        assert not end.value.code and "usage: python -m gans demo [-h]" in capsys.readouterr().out


def test_the_demo_decays_over_the_steps_that_it_is_given(tmp_path, monkeypatch):
    seen = []

    def record(recipe, settings):
        seen.append((recipe.steps, recipe.decay_start, recipe.decay_end))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "describe", lambda recipe, settings: {"attention": []})
    monkeypatch.setattr(demo, "train", record)
    with pytest.raises(KeyboardInterrupt):
        demo.run(["--out", str(tmp_path), "--steps", "180", "--device", "cpu"])
    assert seen == [(180, 69, 180)]


def test_the_last_samples_fill_three_rows(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots.plt, "subplots", lambda rows, columns, **_: shown.append((rows, columns)) or 1 / 0)
    (tmp_path / "samples").mkdir()
    for name in ("real", "step-00000000", "step-00000009"):
        Image.new("L", (64, 64)).save(tmp_path / "samples" / f"{name}.png")  # 16 tiles of 16 px
    with pytest.raises(ZeroDivisionError):
        plots.plot_samples(tmp_path, [0, 9], 16, tmp_path / "out.png", columns=5)
    assert shown == [(1 + 3 + 2, 5)]
