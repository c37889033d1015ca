"""Lazy regularisation in logs and on the bar: a penalty is as large there as if it were in every update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gans.common.distributed import World
from gans.data.sources import open_source
from gans.losses.adversarial import LossConfig
from gans.losses.path_length import PathLengthLossConfig
from gans.models.ema import EMA
from gans.models.stylenat import StyleNATGeneratorConfig
from gans.training.monitor import Monitor
from gans.training.resume import Start
from gans.training.state import TrainState
from gans.training.steps import discriminator_step, generator_step, make_networks

ALONE = World(torch.device("cpu"))


@pytest.fixture
def recipe(tiny):
    generator = StyleNATGeneratorConfig(
        latent_dim=6, dims=(8, 8), dilations=("1",), head_dim=4, depth=1, channels=1, normalization="none"
    )
    return replace(tiny, generator=generator, loss=PathLengthLossConfig(gp_weight=1.0, r1=1.0, r2=1.0), batch_g=4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_penalties_do_not_depend_on_how_often_they_are_due(recipe, accumulate):
    logged = {}
    for every in (1, 16):
        loss = replace(recipe.loss, penalty_every=every, path_length_every=every)
        config = replace(recipe, loss=loss, accumulate=accumulate)
        networks = make_networks(config, ALONE.device)
        torch.manual_seed(0)
        logged[every] = discriminator_step(0, 0, config, networks, torch.rand(4, 1, 8, 8), ALONE)
        logged[every] |= generator_step(0, config, networks, None, ALONE)
    assert logged[16].keys() >= {f"discriminator/{term}" for term in ("penalty", "r1", "r2")} | {
        "generator/path_length"
    }
    for name, value in logged[1].items():
        if name in ("discriminator/gradient_norm", "generator/gradient_norm"):
            assert logged[16][name] > 1.5 * value  # the update itself has them 16-fold
        elif name != "generator/adversarial":  # of a discriminator that has moved differently
            assert logged[16][name] == pytest.approx(value, rel=1e-6), name


def test_the_bar_has_the_mean_penalty_also_between_its_updates(tiny, tiny_run):
    networks = make_networks(replace(tiny, loss=LossConfig(r1=1.0, penalty_every=2)), ALONE.device)
    state = TrainState(networks, EMA(networks.generator, tiny.ema))
    run = replace(tiny_run, log_every=1, sample_every=100)
    with Monitor(tiny, run, Start(), state, open_source("digits"), progress=False) as monitor:
        for lazy in ({"discriminator/r1": 0.25}, {}):
            state.step += 1
            monitor.step_done(
                [{"discriminator/adversarial": 1.0, "discriminator/gradient_norm": 9.0} | lazy], stopped=False
            )
            assert "D=1.25" in monitor._bar.postfix
