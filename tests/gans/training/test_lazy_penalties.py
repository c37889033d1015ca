"""Lazy regularisation in logs and on the bar: a penalty is as large there as if it were in every update. And penalties
in an update of their own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gans.common.distributed import World
from gans.data.sources import open_source
from gans.losses.adversarial import LossConfig
from gans.losses.path_length import PathLengthLossConfig
from gans.models.ema import EMA
from gans.models.stylenat import StyleNATGeneratorConfig
from gans.recipes.named import PRESETS
from gans.recipes.presets_stylenat import LAZY
from gans.training.logs import read
from gans.training.loop import resolved_config, train
from gans.training.monitor import Monitor
from gans.training.resume import Start
from gans.training.state import TrainState
from gans.training.steps import NonFiniteError, discriminator_step, generator_step, make_networks

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
        monitor.begin(resolved_config(tiny, run, state, ALONE), 1797)
        for lazy in ({"discriminator/r1": 0.25}, {}):
            state.step += 1
            monitor.step_done(
                [{"discriminator/adversarial": 1.0, "discriminator/gradient_norm": 9.0} | lazy], stopped=False
            )
            assert "D=1.25" in monitor._bar.postfix


def weights(networks):
    return [parameter.detach().clone() for parameter in networks.discriminator.parameters()]


def test_penalties_of_their_own_are_a_second_step_of_adam(recipe):
    """From where the first has led, with its moments; the first is that of a loss without penalties, and is clipped."""
    still = replace(recipe, discriminator=replace(recipe.discriminator, noise=False, augment=()), precision="fp64")
    own = replace(still, penalty_update="own", clip=1e-3, loss=LossConfig(gp_weight=0.0, r1=50.0))
    real = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    plain = replace(own, penalty_update="joint", loss=LossConfig(gp_weight=0.0))
    networks, expected = (make_networks(config, ALONE.device) for config in (own, plain))
    loss, penalty = own.updates
    first = discriminator_step(0, 0, own, networks, real, ALONE, loss)
    assert first == discriminator_step(0, 0, plain, expected, real, ALONE)
    assert all(map(torch.equal, weights(networks), weights(expected)))

    second = discriminator_step(0, 0, own, networks, real, ALONE, penalty)
    images = real.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(expected.discriminator(images).sum(), images, create_graph=True)
    r1 = 25 * slopes.square().sum((1, 2, 3)).mean()
    r1.backward()
    expected.optimizer_d.step()
    norm = torch.stack([p.grad.square().sum() for p in expected.discriminator.parameters() if p.grad is not None])
    assert second == pytest.approx(
        {"discriminator/r1": r1.item(), "discriminator/penalty_gradient_norm": norm.sum().sqrt().item()}, rel=1e-9
    )
    for found, right in zip(weights(networks), weights(expected), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


def test_seventeen_steps_of_adam_in_sixteen(recipe):
    """What StyleGAN2's correction of learning rate and betas, 16/17, is made for."""
    loss = replace(recipe.loss, penalty_every=16, path_length_every=8)
    config = replace(recipe, loss=loss, n_critic=1, penalty_update="own")
    networks = make_networks(config, ALONE.device)
    logs = []
    for step in range(16):
        for what in config.updates:
            logs.append(discriminator_step(step, 0, config, networks, torch.rand(4, 1, 8, 8), ALONE, what))
            logs.append(generator_step(step, config, networks, None, ALONE, what))
    steps = [
        {int(state["step"]) for state in optimizer.state.values()}
        for optimizer in (networks.optimizer_d, networks.optimizer_g)
    ]
    assert max(steps[0]) == 17 and max(steps[1]) == 18
    assert sum("discriminator/penalty_gradient_norm" in log for log in logs) == 1


def test_recipes_with_the_correction_have_the_update(recipe):
    lazy = {name for name, known in PRESETS.items() if known.recipe.lr_d == 2e-4 * LAZY and known.recipe.loss.r1}
    assert lazy == {name for name, known in PRESETS.items() if known.recipe.penalty_update == "own"}
    assert lazy == {"stylenat-ffhq256", "stylenat-ffhq1024", "stylenat-church256"}
    with pytest.raises(ValueError, match=r"penalty_update is 'both'; it must be one of joint, own"):
        replace(recipe, penalty_update="both")


def test_a_run_with_updates_of_their_own(recipe, tiny_run):
    loss = replace(recipe.loss, penalty_every=2, path_length_every=2)
    train(replace(recipe, loss=loss, n_critic=1, steps=3, penalty_update="own"), tiny_run, progress=False)
    names = {"discriminator/r1", "discriminator/penalty_gradient_norm", "generator/penalty_gradient_norm"}
    assert names <= set().union(*read(Path(tiny_run.out)))


def test_a_penalty_that_is_not_finite_takes_back_its_own_update_only(recipe):
    config = replace(recipe, penalty_update="own")
    networks = make_networks(config, ALONE.device)
    loss, penalty = config.updates
    before = weights(networks)
    discriminator_step(0, 0, config, networks, torch.rand(4, 1, 8, 8), ALONE, loss)
    moved = weights(networks)
    assert not all(map(torch.equal, before, moved))
    networks.loss.config = replace(config.loss, r1=3e38, r2=3e38)  # beyond float32
    with pytest.raises(NonFiniteError) as error:
        discriminator_step(0, 0, config, networks, torch.rand(4, 1, 8, 8), ALONE, penalty)
    assert error.value.names == tuple(
        f"discriminator/{name}" for name in ("penalty", "r1", "r2", "penalty_gradient_norm")
    )
    assert all(map(torch.equal, moved, weights(networks)))
