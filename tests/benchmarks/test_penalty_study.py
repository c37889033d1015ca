"""benchmarks.penalty_study: its arithmetic on a network whose answers are known, and a run of everything in small."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import penalty_study
from benchmarks.penalties import accuracy, cost, training
from gans.losses.adversarial import LossConfig
from gans.recipes.registry import build

PIXELS = 3


class Linear(nn.Module):
    """D(x) = w . x. |grad D|^2 = |w|^2 everywhere, a difference is exact, and an estimate's gradient in the weights is
    the mean of 2 (w . v) v over the images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, x):
        return x.flatten(1) @ self.w


def test_accuracy_of_a_linear_network(monkeypatch):
    monkeypatch.setattr(accuracy, "SIGMAS", (1e-4, 0.1))
    images = torch.zeros(8, 1, 1, PIXELS)
    rows = accuracy.study(Linear(), images, draws=100, batches=torch.zeros(2, 8, 1, 1, PIXELS))
    found = {(row["mode"], row["sigma"], row["precision"]): row for row in rows}
    assert found["exact, other batches", None, "fp64"]["scatter"] == 0
    exact = found["exact", None, "fp32"]
    assert exact["error"] < 1e-6 and exact["cosine"] == pytest.approx(1)
    for key in (("jvp", None, "fp32"), ("finite-difference", 0.1, "fp32")):
        row = found[key]
        assert row["bias"] < 1e-4 and row["error"] < 1e-4
        # E |(w . v) v - w|^2 = (d + 1) |w|^2, a B-th of it over B images.
        assert row["scatter"] == pytest.approx(((PIXELS + 1) / 8) ** 0.5, rel=0.1)
    assert found["finite-difference", 0.0001, "bf16"]["error"] > 1e-3


def test_bias_is_what_is_left_of_errors_that_scatter():
    torch.manual_seed(0)
    truth = torch.tensor([0.0, 2.0], dtype=torch.float64)
    moments = accuracy._Moments(truth)
    for _ in range(2000):
        along = truth + torch.randn(2, dtype=torch.float64)
        moments.add(along + torch.tensor([0.5, 0.0]) + torch.randn(2, dtype=torch.float64), along)
    found = moments.accuracy("jvp", None, "fp32")
    assert found.bias == pytest.approx(0.25, rel=0.1)
    assert found.error == pytest.approx((0.25 + 2) ** 0.5 / 2, rel=0.05)
    assert found.scatter == pytest.approx((0.25 + 4) ** 0.5 / 2, rel=0.05)


@pytest.mark.parametrize("tokens", cost.PATCHES)
def test_discriminators_of_a_cost(tokens):
    config = cost.recipe(tokens, "exact", 2)
    with torch.device("meta"):
        assert build(config.discriminator).pos_embed.shape[1] == tokens + 1
    assert config.loss.r1 == config.loss.r2 == 0.1
    assert cost.recipe(tokens, None, 2).loss.r1 == 0


@pytest.fixture
def small(monkeypatch):
    """The recipes of the study, made smaller."""
    recipe = penalty_study.discriminating_recipe()
    generator = replace(recipe.generator, dim=12, depth=1, implicit_dim=8, latent_dim=8)
    discriminator = replace(recipe.discriminator, dim=12, depth=1)
    recipe = replace(recipe, generator=generator, discriminator=discriminator, batch_d=4, batch_g=4)
    monkeypatch.setattr(penalty_study, "discriminating_recipe", lambda: recipe)
    loss = LossConfig("relativistic", gp_weight=0, drift=0, r1=0.1)
    monkeypatch.setattr(penalty_study, "curve_recipe", lambda: replace(recipe, loss=loss))
    monkeypatch.setattr(training, "MEASURED", 8)
    monkeypatch.setattr(accuracy, "SIGMAS", (0.01,))


def test_everything_in_small(tmp_path, monkeypatch, small):
    def measure(tokens, batch, repeats, threads):
        entry = {"tokens": tokens, "spread": 0.01, "peak_mib": 10.0}
        times = {(None, "fused"): 1.0, ("exact", "fused"): 2.4, ("finite-difference", "fused"): 2.0}
        return [entry | {"mode": m, "attention": a, "seconds": s} for (m, a), s in times.items()]

    monkeypatch.setattr(penalty_study.cost, "measure", measure)
    options = f"--out {tmp_path} --batch 2 --draws 2 --steps 1 --tokens 64 --seconds 0.01 --seeds 1 --points 1"
    assert penalty_study.main(options.split()) == 0
    result = json.loads((tmp_path / "penalty_study.json").read_text())
    assert {row["step"] for row in result["accuracy"]["rows"]} == {0, 1}
    curves = result["curves"]["rows"]
    assert [(row["mode"], row["seed"]) for row in curves] == [("exact", 0), ("finite-difference", 0)]
    assert all(row["step"] >= 1 and row["seconds"] >= 0.01 for row in curves)
    page = (tmp_path / "penalty_study.md").read_text()
    assert "| R1 | step 0, fp32 | step 0, bf16 | step 1, fp32 | step 1, bf16 |" in page
    assert "| finite-difference, 0.01 | " in page
    assert "exact / finite differences, time: 1.20 (64 tokens); goal 1.3" in page
    assert (tmp_path / "curves.png").is_file()


def test_parts_are_kept(tmp_path, monkeypatch):
    (tmp_path / "penalty_study.json").write_text(json.dumps({"cost": "as it was"}))
    monkeypatch.setattr(penalty_study, "accuracies", lambda *options: [])
    monkeypatch.setattr(penalty_study.page, "page", lambda result: "")
    assert penalty_study.main(["--out", str(tmp_path), "--only", "accuracy"]) == 0
    result = json.loads((tmp_path / "penalty_study.json").read_text())
    assert result["cost"] == "as it was" and result["accuracy"]["rows"] == []


@pytest.mark.parametrize("option", ["--draws 0", "--seconds -1", "--tokens 65"])
def test_arguments_are_checked(tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        penalty_study.parse(["--out", str(tmp_path), *option.split()])
    assert option.split()[0] in capsys.readouterr().err
