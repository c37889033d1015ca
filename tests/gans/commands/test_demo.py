from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from PIL import Image

from gans.commands import demo
from gans.training.profile import StepCost, measure, measure_apart


def test_demo_in_two_steps(tmp_path, monkeypatch, capsys):
    small = {"backend": "reference", "seconds": 2.0, "peak_mib": 300.0}
    costs = [StepCost(**small), StepCost(**(small | {"seconds": 8.0, "peak_mib": 900.0}))]
    monkeypatch.setattr(demo, "compare", lambda *arguments, **options: costs)
    monkeypatch.setattr(demo, "DIGITS", replace(demo.DIGITS, batch_d=2, batch_g=2))
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


def test_the_demo_is_a_module_and_a_command():
    for module in (["gans.demo"], ["gans", "demo"]):
        shown = subprocess.run([sys.executable, "-m", *module, "--help"], capture_output=True, text=True, check=True)
        assert "usage: python -m gans demo [-h]" in shown.stdout
