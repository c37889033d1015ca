"""Gradient checkpointing, mixed precision, and the dry run's estimate of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import natten_ext
from gans.common.distributed import World
from gans.losses.adversarial import LossConfig
from gans.recipes.config import RunConfig
from gans.training.dry_run import PeakMemory, describe
from gans.training.recompute import recompute_blocks
from gans.training.steps import discriminator_gradients, generator_gradients, make_networks, precision

ALONE = World(torch.device("cpu"))
PLAIN = LossConfig(gp_weight=0.0)
"""Without penalties, whose second derivatives take most of a dry run's time."""
REAL = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)


def gradients(config, *, recompute: bool = False) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Terms and all parameter gradients of one update of each network."""
    networks = make_networks(config, ALONE.device)
    models = {"g": networks.generator, "d": networks.discriminator}
    for model in models.values():
        for name, parameter in model.named_parameters():
            if "noise" in name:
                torch.nn.init.constant_(parameter, 0.3)
        if recompute:
            assert recompute_blocks(model) > 0
    real = REAL.to(next(networks.discriminator.parameters()).dtype)
    terms = dict(discriminator_gradients(0, 0, config, networks, real, ALONE))
    terms |= {f"g/{name}": term for name, term in generator_gradients(0, config, networks, None, ALONE).items()}
    found = {f"{k}.{name}": p.grad for k, model in models.items() for name, p in model.named_parameters()}
    return {name: float(term) for name, term in terms.items()}, found


def test_recomputed_blocks_have_the_same_gradients(tiny):
    """With the penalty's second derivative, DiffAug and noise, in float64."""
    config = replace(tiny, precision="fp64", loss=replace(tiny.loss, r1=1.0), accumulate=2)
    terms, expected = gradients(config)
    again, found = gradients(config, recompute=True)
    assert terms == pytest.approx(again, rel=1e-12)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_recomputing_needs_less_memory(tiny):
    deep = replace(tiny, discriminator=replace(tiny.discriminator, depths=(3, 1)), batch_d=16, batch_g=16)
    run = RunConfig(data="x", out="y", device="cpu")
    kept = describe(deep, run)["memory_mib"]
    recomputed = describe(deep, replace(run, gradient_checkpointing=True))["memory_mib"]
    for network in ("discriminator", "generator"):
        assert recomputed[f"activations, {network} update"] < 0.9 * kept[f"activations, {network} update"]


def test_bf16_is_close_and_penalties_are_in_full_precision(tiny):
    plain = replace(tiny, loss=replace(tiny.loss, drift=0.0))
    mixed = replace(plain, precision="bf16")
    with natten_ext.record_calls() as calls:
        exact, expected = gradients(plain)
    assert {call.dtype for call in calls} == {torch.float32}
    with natten_ext.record_calls() as calls:
        rough, found = gradients(mixed)
    assert {call.dtype for call in calls} == {torch.bfloat16, torch.float32}
    assert rough["penalty"] == pytest.approx(exact["penalty"], rel=0.02)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() < 0.1 * gradient.norm() + 1e-3, name
    with natten_ext.record_calls() as calls:
        gradients(replace(mixed, penalty_precision="same"))
    assert {call.dtype for call in calls} == {torch.bfloat16}


def test_autocast_of_a_penalty(tiny):
    bf16 = replace(tiny, precision="bf16")
    cpu = torch.device("cpu")
    with precision(bf16, cpu):
        assert torch.is_autocast_enabled("cpu")
        with precision(bf16, cpu, penalty=True):
            assert not torch.is_autocast_enabled("cpu")
    with precision(tiny, cpu):
        assert not torch.is_autocast_enabled("cpu")


def test_peak_memory_counts_what_lives():
    with PeakMemory() as memory:
        a = torch.zeros(256)
        view = a.view(16, 16).T
        assert memory.now == 1024
        b = a + 1
        del b
        assert memory.now == 1024 and memory.take_peak() == 2048
        del a, view
        assert memory.now == 0 and memory.take_peak() == 1024


def test_estimate_names_the_attention_of_a_process(tiny):
    run = RunConfig(data="x", out="y", device="cpu", backend="reference")
    tiny = replace(tiny, loss=PLAIN)
    shown = describe(replace(tiny, batch_d=16, batch_g=24, accumulate=2), run, processes=2)
    assert shown["processes"] == 2
    shapes = {(row["network"], tuple(row["shape"])): row for row in shown["attention"]}
    assert shapes["generator", (6, 8, 8, 2, 4)]["keys"] == 16
    assert shapes["discriminator", (4, 4, 4, 2, 6)]["backend"] == "reference"
    assert shapes["discriminator", (4, 5, 2, 8)]["kind"] == "full"


def test_estimate_names_the_backends_that_run(tiny, monkeypatch):
    """Where the choice depends on the kind of neighborhood."""

    def order(device, dtype, head_dim, neighborhood, keys):
        return ("reference",) if neighborhood == "grid" else ("cpu", "reference")

    monkeypatch.setattr(natten_ext.backends.choice, "_candidates", order)
    shown = describe(replace(tiny, loss=PLAIN), RunConfig(data="x", out="y", device="cpu"))
    named = {(row["kind"], row["backend"]) for row in shown["attention"]}
    networks = make_networks(tiny, torch.device("cpu"))
    with natten_ext.record_calls() as calls:
        networks.discriminator(networks.generator(torch.randn(2, 6)))
    assert named == {(call.neighborhood, call.backend) for call in calls} == {("grid", "reference"), ("full", "cpu")}
