"""Training with each `penalty_mode`: steps, parts, precision, resuming, and what is refused before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gans.commands.train import parse
from gans.common.distributed import World
from gans.losses.adversarial import LossConfig
from gans.recipes.config import TrainConfig, from_dict, to_dict
from gans.training.dry_run import describe
from gans.training.loop import synchronize_batch_norm, train
from gans.training.steps import discriminator_gradients, make_networks

MODES = ("exact", "finite-difference", "jvp")
ESTIMATES = MODES[1:]
ALONE = World(torch.device("cpu"))


@pytest.fixture
def recipe(tiny) -> TrainConfig:
    loss = LossConfig(adversarial="relativistic", gp_weight=0, drift=0, r1=1.0, r2=0.5, penalty_every=2)
    return replace(tiny, loss=loss)


def with_mode(recipe: TrainConfig, mode: str, **fields) -> TrainConfig:
    return replace(recipe, loss=replace(recipe.loss, penalty_mode=mode), **fields)


def weights(path: Path) -> dict[str, torch.Tensor]:
    names = ("generator", "discriminator")
    return {f"{n}.{key}": value for n in names for key, value in load_file(path / f"{n}.safetensors").items()}


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_uninterrupted_one(recipe, tiny_run, tmp_path, mode):
    config = with_mode(recipe, mode, steps=3)
    whole = train(config, tiny_run, progress=False)
    parts = replace(tiny_run, out=str(tmp_path / "parts"))
    train(replace(config, steps=2), parts, progress=False)
    resumed = train(config, replace(parts, resume="latest"), progress=False)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    saved = json.loads((resumed / "config.json").read_text())["recipe"]
    assert from_dict(TrainConfig, saved) == config and saved["loss"]["penalty_mode"] == mode


def test_a_run_may_go_on_in_another_mode(recipe, tiny_run):
    """Also one from before there was the choice."""
    first = train(replace(recipe, steps=2), tiny_run, progress=False)
    values = to_dict(recipe)
    for name in ("penalty_mode", "penalty_sigma"):
        del values["loss"][name]
    assert from_dict(TrainConfig, values) == recipe
    config = replace(recipe, loss=replace(recipe.loss, penalty_mode="finite-difference", penalty_sigma=0.02))
    train(replace(config, steps=3), replace(tiny_run, resume="latest"), progress=False)
    lines = [json.loads(line) for line in (first.parents[1] / "log.jsonl").read_text().splitlines()]
    changed = [line["changed"] for line in lines if line.get("event") == "start"][-1]
    assert changed["loss.penalty_mode"] == "exact -> finite-difference"
    assert changed["loss.penalty_sigma"] == "0.01 -> 0.02"


def gradients(config: TrainConfig, real: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    networks = make_networks(config, ALONE.device)
    dtype = next(networks.discriminator.parameters()).dtype
    terms = discriminator_gradients(0, 0, config, networks, real.to(dtype), ALONE)
    found = {name: p.grad.double() for name, p in networks.discriminator.named_parameters()}
    return found, {name: float(term) for name, term in terms.items()}


@pytest.mark.parametrize("mode", ESTIMATES)
def test_parts_of_a_batch_get_the_directions_of_the_whole(recipe, mode):
    torch.manual_seed(0)
    real = torch.rand(4, 1, 8, 8) * 2 - 1
    whole, parts = (gradients(with_mode(recipe, mode, precision="fp64", accumulate=n), real) for n in (1, 2))
    assert parts[1] == pytest.approx(whole[1], rel=1e-8)
    for name, value in whole[0].items():
        torch.testing.assert_close(parts[0][name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("mode", "penalty_precision", "tolerance"),
    [("finite-difference", "full", 0.02), ("jvp", "full", 1e-4), ("jvp", "same", 0.1)],
)
def test_precision_of_penalties(recipe, mode, penalty_precision, tolerance):
    """Beside bfloat16, penalties are in float32: as good as in float64. `same` has them in bfloat16."""
    torch.manual_seed(0)
    real = torch.rand(4, 1, 8, 8) * 2 - 1
    config = with_mode(recipe, mode, penalty_precision=penalty_precision)
    config = replace(config, loss=replace(config.loss, r2=0))  # generated images differ between precisions
    _, low = gradients(replace(config, precision="bf16"), real)
    _, high = gradients(replace(config, precision="fp32"), real)
    assert low["r1"] == pytest.approx(high["r1"], rel=tolerance)
    assert low["r1"] > 0


@pytest.mark.parametrize("mode", ESTIMATES)
def test_a_dry_run(recipe, tiny_run, mode):
    recipe = replace(recipe, loss=replace(recipe.loss, r2=0))
    assert describe(with_mode(recipe, mode), tiny_run)["memory_mib"]["activations, discriminator update"] > 0


def test_on_the_command_line(capsys):
    options = ["--data", "x", "--out", "y", "--preset", "vitgan32-small", "--loss.penalty-mode", "jvp"]
    assert parse(options).recipe.loss.penalty_mode == "jvp"
    for more, message in (
        (["--loss.gp-weight", "5"], "loss.gp_weight (now 5.0) 0"),
        (["--gradient-checkpointing"], "gradient_checkpointing cannot go with"),
    ):
        with pytest.raises(SystemExit):
            parse([*options, *more])
        shown = capsys.readouterr().err.replace("│", " ")
        assert message in " ".join(shown.split())


def test_refused_before_it_starts(recipe, tiny_run):
    checkpointing = replace(tiny_run, gradient_checkpointing=True)
    for attempt in (train, describe):
        with pytest.raises(ValueError, match=r"gradient_checkpointing cannot go with loss\.penalty_mode 'jvp'"):
            attempt(with_mode(recipe, "jvp"), checkpointing)
    with pytest.raises(ValueError, match=r"bfloat16 cannot resolve loss\.penalty_mode 'finite-difference'"):
        with_mode(recipe, "finite-difference", precision="bf16", penalty_precision="same")


def test_finite_differences_with_gradient_checkpointing(recipe, tiny_run, tmp_path):
    config = with_mode(recipe, "finite-difference", precision="fp64", steps=2)
    plain = weights(train(config, tiny_run, progress=False))
    again = replace(tiny_run, out=str(tmp_path / "again"), gradient_checkpointing=True)
    for name, value in weights(train(config, again, progress=False)).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-9, atol=1e-11)


def test_batch_norms_of_several_processes_have_no_penalties():
    """Their synchronised form has no second derivative."""
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    several = SimpleNamespace(size=2, device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"Sequential has batch norms, .* 2 processes .* loss\.r1 and loss\.r2 0"):
        synchronize_batch_norm(model, several, penalized=True)
    assert synchronize_batch_norm(model, ALONE, penalized=True) is model
