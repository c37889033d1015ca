"""What is not finite: skipped without a trace, stopped in the end, never in a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gans.common.distributed import World
from gans.losses import path_length
from gans.losses.adversarial import GANLoss
from gans.losses.path_length import PathLengthLossConfig
from gans.models.fastgan import FastGANGeneratorConfig, PixelNoise
from gans.models.stylenat import StyleNATGeneratorConfig
from gans.models.transgan import DiscriminatorConfig
from gans.recipes import registry
from gans.recipes.config import TrainConfig
from gans.training import checkpoint, steps
from gans.training.loop import train
from gans.training.steps import NonFiniteError, discriminator_step, generator_step, make_networks

ALONE = World(torch.device("cpu"))


@pytest.fixture
def fastgan(tiny) -> TrainConfig:
    """Batch norms and spectral norms in the generator."""
    return replace(
        tiny,
        generator=FastGANGeneratorConfig(latent_dim=6, image_size=32, width=8, skip_ratio=8, channels=1),
        discriminator=DiscriminatorConfig(channels=1, patch_dims=(12, 4), depths=(1, 1), windows=(4, 2), heads=2),
        steps=3,
    )


def broken_in_calls(function, numbers, breaks):
    """`function`, what it returns changed by `breaks` in calls of these numbers, from 1."""
    calls = 0

    def changed(*arguments):
        nonlocal calls
        calls += 1
        result = function(*arguments)
        return breaks(result) if calls in numbers else result

    return changed


def first_row(value: float):
    def breaks(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:1] * value, x[1:]])

    return breaks


def test_a_skipped_update_leaves_no_trace_in_the_mean_path_length(tiny, tiny_run, monkeypatch):
    lengths = []

    def noted(generator, z):
        lengths.append(path_length_of(generator, z))
        return lengths[-1]

    path_length_of = path_length.path_lengths
    monkeypatch.setattr(path_length, "path_lengths", broken_in_calls(noted, {2}, first_row(float("nan"))))
    recipe = replace(
        tiny,
        generator=StyleNATGeneratorConfig(
            latent_dim=6,
            dims=(8, 8),
            dilations=("1",),
            head_dim=4,
            min_heads=2,
            depth=1,
            mapping_depth=1,
            channels=1,
            normalization="none",
        ),
        loss=PathLengthLossConfig(path_length_every=1, path_length_decay=0.25),
        steps=4,
    )
    path = train(recipe, replace(tiny_run, non_finite="skip"), progress=False)
    assert checkpoint.load_state(path)["skipped"] == 1
    mean = torch.zeros(())
    for number in (0, 2, 3):
        mean = mean.lerp(lengths[number].detach().mean(), 0.25)
    torch.testing.assert_close(load_file(path / "loss.safetensors")["mean_length"], mean)


@pytest.mark.parametrize("network", ["discriminator", "generator"])
def test_a_skipped_update_leaves_no_trace_in_statistics_and_spectral_norms(fastgan, monkeypatch, network):
    networks = make_networks(fastgan, ALONE.device)
    before = {name: buffer.clone() for name, buffer in networks.buffers().items()}
    assert {name.rpartition(".")[2] for name in before} >= {"running_var", "num_batches_tracked", "left_vector"}
    monkeypatch.setattr(steps, "latents", broken_in_calls(steps.latents, {1}, first_row(float("inf"))))

    def update():
        if network == "generator":
            return generator_step(0, fastgan, networks, None, ALONE)
        return discriminator_step(0, 0, fastgan, networks, torch.rand(4, 1, 32, 32), ALONE)

    with pytest.raises(NonFiniteError, match=f"step 1: {network}/adversarial is nan"):
        update()
    assert all(torch.equal(buffer, before[name]) for name, buffer in networks.buffers().items())
    update()
    assert not torch.equal(
        networks.buffers()["generator.input.1.running_mean"], before["generator.input.1.running_mean"]
    )


def test_an_infinite_z_in_a_run_with_batch_norms(fastgan, tiny_run, monkeypatch):
    monkeypatch.setattr(steps, "latents", broken_in_calls(steps.latents, {1, 6}, first_row(float("inf"))))
    path = train(fastgan, replace(tiny_run, non_finite="skip"), progress=False)
    assert checkpoint.load_state(path)["skipped"] == 2
    for name in ("generator", "generator_ema", "discriminator"):
        for key, value in load_file(path / f"{name}.safetensors").items():
            assert value.isfinite().all(), (name, key)


def test_a_variance_that_overflows_does_not_hide_in_a_batch_norm(fastgan):
    networks = make_networks(fastgan, ALONE.device)
    for module in networks.generator.modules():
        if isinstance(module, PixelNoise):
            torch.nn.init.constant_(module.strength, 1e25)
    with pytest.raises(NonFiniteError, match=r"step 1: buffer generator.blocks.8.1.2.running_var is not finite"):
        generator_step(0, fastgan, networks, None, ALONE)


class BrokenPenalty(GANLoss):
    """The discriminator's penalty is never finite."""

    def discriminator_penalty(self, discriminator, real, fake, *, step):
        terms = super().discriminator_penalty(discriminator, real, fake, step=step)
        return {name: term * float("nan") for name, term in terms.items()}


@pytest.mark.parametrize(("every", "stopped_in"), [(1, 2), (4, 5)])
def test_good_updates_of_another_kind_do_not_reset_the_count(tiny, tiny_run, monkeypatch, every, stopped_in):
    """Of two discriminator updates a step all are broken, or each fourth, the one with the lazy penalty."""
    monkeypatch.setitem(registry._NAMED, type(tiny.loss), ("standard", registry.Entry(type(tiny.loss), BrokenPenalty)))
    recipe = replace(tiny, loss=replace(tiny.loss, penalty_every=every))
    with pytest.raises(NonFiniteError, match=f"step {stopped_in}: discriminator/penalty is nan"):
        train(recipe, replace(tiny_run, non_finite="skip", max_skips=3), progress=False)


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_weights_that_are_not_finite_get_no_checkpoint(tiny, tiny_run, monkeypatch, non_finite):
    """The last update may break them, and no other finds out."""

    def break_weights(step, config, networks, *rest):
        values = generator_step(step, config, networks, *rest)
        if step == 2:
            torch.nn.init.constant_(next(networks.generator.parameters()), float("inf"))
        return values

    monkeypatch.setattr("gans.training.loop.generator_step", break_weights)
    with pytest.raises(NonFiniteError, match=r"step 3: generator\..* no checkpoint.*Last good checkpoint: .*00000002"):
        train(replace(tiny, steps=3), replace(tiny_run, non_finite=non_finite), progress=False)
    assert [p.name for p in (Path(tiny_run.out) / "checkpoints").iterdir()] == ["step-00000002"]
