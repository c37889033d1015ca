from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from gans.losses.adversarial import LossConfig
from gans.models.ema import EMA, EMAConfig
from gans.models.spectral_norm import SpectralConv2d
from gans.recipes.config import RunConfig, TrainConfig, differences, from_dict, to_dict
from gans.recipes.named import PRESETS, preset
from gans.recipes.registry import build


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    recipe = replace(preset(name), ema=EMAConfig(decay=0.99), steps=123)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_unknown_keys_raise():
    values = to_dict(TrainConfig())
    values["generator"]["depth"] = 3
    with pytest.raises(ValueError, match=r"GeneratorConfig has no depth; it has anti_alias, base_dim, .*windows"):
        from_dict(TrainConfig, values)
    del values["generator"]["depth"]
    values["generator"]["kind"] = "unheard-of"
    with pytest.raises(ValueError, match="the kind of generator is 'unheard-of'; it must be one of transgan"):
        from_dict(TrainConfig, values)


def test_differences_name_nested_fields():
    old = TrainConfig()
    new = replace(old, lr_d=1.0, generator=replace(old.generator, norm="rms"))
    assert differences(to_dict(old), to_dict(new)) == {
        "generator.norm": "layer -> rms",
        "lr_d": "0.0001 -> 1.0",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 3}, "accumulate"),
        ({"n_critic": 0}, "n_critic is 0"),
        ({"batch_g": 0}, "batch_g is 0"),
        ({"clip": -1.0}, "clip"),
        ({"lr_d": math.nan}, "lr_d is nan; it must be finite"),
        ({"clip": math.inf}, "clip is inf; it must be finite"),
        ({"betas_g": (0.0, math.nan)}, "betas_g is nan; it must be finite"),
        ({"loss": LossConfig(gp_weight=math.nan)}, r"loss\.gp_weight is nan; it must be finite"),
        ({"betas_d": (0.0, 1.0)}, r"betas_d is \(0\.0, 1\.0\); both must be in"),
        ({"seed": 2**40}, "seed is 1099511627776; it must be between"),
        ({"decay_start": 5, "decay_end": 5}, "decay_end is 5"),
        ({"discriminator": preset("stl10").discriminator}, "image_size"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TrainConfig(), **change)


@pytest.mark.parametrize("field", ["log_every", "keep", "sample_count"])
def test_bad_runs(field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        RunConfig(data="x", out="y", **{field: 0})


def test_preset_and_registry_errors():
    with pytest.raises(ValueError, match="'cifar'"):
        preset("cifar")
    with pytest.raises(TypeError, match="EMAConfig"):
        build(EMAConfig())


def test_ema_half_life_rampup_and_buffers():
    model = torch.nn.BatchNorm1d(2)
    average = EMA(model, EMAConfig(half_life=100, rampup=0.1))
    assert average.decay(images=10_000, batch=50) == pytest.approx(0.5**0.5)  # half a half-life
    assert average.decay(images=200, batch=20) == pytest.approx(0.5)  # ramp-up: half-life 0.1 * 200
    assert EMA(model, EMAConfig(decay=0.9)).decay(images=1, batch=1) == 0.9
    before = average.model.running_mean.clone()
    with torch.no_grad():
        model.running_mean.fill_(4.0)
        model.weight.fill_(3.0)
        model.num_batches_tracked.fill_(7)
    average.update(model, images=10_000, batch=100)
    torch.testing.assert_close(average.model.running_mean, before + 0.5 * (4 - before))
    torch.testing.assert_close(average.model.weight, torch.full((2,), 2.0))
    assert average.model.num_batches_tracked == 7
    assert not any(p.requires_grad for p in average.model.parameters())


def test_ema_keeps_spectral_norms_of_its_own():
    """The vectors of the trained network turn; their averages would be too short, and the averaged weight too large."""
    torch.manual_seed(0)
    model = SpectralConv2d(6, 8, 3)
    average = EMA(model, EMAConfig(decay=0.9))
    for step in range(60):
        with torch.no_grad():
            model.weight.copy_(torch.randn_like(model.weight))
        model.begin_step()
        average.update(model, images=step + 1, batch=1)
    assert average.model.left_vector.norm() == pytest.approx(1, abs=1e-5)
    norm = torch.linalg.matrix_norm(average.model.normalized_weight().flatten(1), 2)
    assert 0.999 < norm < 1.5  # one step of power iteration per update, on a weight that moves; 8.3 if averaged
