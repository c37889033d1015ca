"""Adaptive augmentation: where it goes, what it sees, and that a resumed run goes on with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gans.common.distributed import World
from gans.losses.adversarial import LossConfig
from gans.models.adaptive import ADA, ADAConfig
from gans.models.augment import augment_alike, diff_augment
from gans.training import checkpoint, logs
from gans.training.loop import train
from gans.training.steps import discriminator_step, make_networks

CONFIG = ADAConfig(target=0.6, images=100)


def test_the_probability_moves_towards_the_target_and_stays_in_range():
    ada = ADA(CONFIG, relativistic=False)
    seen = []
    for sign in (1.0, 0.7, 0.5, -1.0, -1.0, 1.0):
        ada.move(sign, 10)
        seen.append(ada.probability)
    assert seen == pytest.approx([0.1, 0.2, 0.1, 0.0, 0.0, 0.1])
    for _ in range(20):
        ada.move(1.0, 10)
    assert ada.probability == 1.0


@pytest.mark.parametrize(("relativistic", "expected"), [(False, [0.5, 0.0]), (True, [0.0, 1.0])])
def test_signs_of_scores(relativistic, expected):
    ada = ADA(CONFIG, relativistic=relativistic)
    ada.note(torch.tensor([3.0, 1.0, 2.0, -1.0]), torch.tensor([5.0, 0.0, 3.0, -4.0]))
    ada.note(torch.tensor([[3.0, -1.0], [-4.0, 1.0]]), torch.full((2, 2), -9.0))
    assert [sign.item() for sign in ada.signs] == expected
    assert ada.take_sign().item() == sum(expected) / 2 and not ada.signs


def test_what_is_augmented_and_watched():
    class Network:
        config = type("Config", (), {"channels": 3})
        scored_together = staticmethod(lambda batch: batch)

        def __call__(self, images, augment=True):
            self.given = images
            return images.mean((1, 2, 3))

    ada, network = ADA(CONFIG, relativistic=False), Network()
    real, fake = torch.rand(4, 3, 8, 8), torch.rand(4, 6, 8, 8)
    watched = ada.watch(network, real, fake)
    watched(real)
    assert network.given is real and not ada.signs  # at 0 nothing happens
    ada.probability = 1.0
    torch.manual_seed(0)
    watched(fake)
    torch.manual_seed(0)
    levels = augment_alike(fake.split(3, dim=1), CONFIG.policy, 1.0)
    assert torch.equal(network.given, torch.cat(levels, dim=1)) and len(ada.signs) == 1
    torch.manual_seed(0)
    assert torch.equal(levels[0], diff_augment(fake[:, :3], CONFIG.policy))
    watched(real, augment=False)
    assert network.given is real
    watched(real)
    watched(real.clone())
    assert len(ada.signs) == 1 and watched.scored_together(4) == 4
    ada.watch(network)(real)
    assert len(ada.signs) == 1


@pytest.mark.parametrize("adversarial", ["wasserstein", "relativistic"])
def test_an_update_notes_the_signs_of_all_parts(tiny, adversarial):
    recipe = replace(
        tiny, ada=CONFIG, accumulate=2, loss=LossConfig(adversarial=adversarial, gp_weight=0, drift=0, r1=1, r2=1)
    )
    alone = World(torch.device("cpu"))
    networks = make_networks(recipe, alone.device)
    networks.ada.probability = 0.5
    networks.ada.signs.append(torch.tensor(7.0))  # of an update that was left out
    logged = discriminator_step(0, 0, recipe, networks, torch.rand(4, 1, 8, 8), alone)
    assert -1 <= logged["ada/sign"] <= 1 and logged["ada/probability"] == pytest.approx(
        0.5 + 0.04 * (1 if logged["ada/sign"] > 0.6 else -1)
    )
    assert not networks.ada.signs


def test_a_resumed_run_goes_on_bit_for_bit(tiny, tiny_run, tmp_path):
    recipe = replace(tiny, ada=ADAConfig(target=0.001, images=40))
    whole = train(recipe, tiny_run, progress=False)
    line = [line for line in logs.read(Path(tiny_run.out)) if "ada/probability" in line][-1]
    assert 0 <= line["ada/probability"] <= 1
    parts = replace(tiny_run, out=str(tmp_path / "parts"))
    first = train(replace(recipe, steps=3), parts, progress=False)
    assert checkpoint.load_state(first)["augment_probability"] > 0
    second = train(recipe, replace(parts, resume="latest"), progress=False)
    for name in ("generator", "discriminator"):
        one, two = (load_file(path / f"{name}.safetensors") for path in (whole, second))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_without_it_keeps_the_probability_for_a_later_one(tiny, tiny_run):
    recipe = replace(tiny, ada=ADAConfig(target=0.001, images=40))
    first = train(replace(recipe, steps=3), tiny_run, progress=False)
    probability = checkpoint.load_state(first)["augment_probability"]
    assert probability > 0
    resumed = replace(tiny_run, resume="latest")
    without = train(replace(tiny, steps=4), resumed, progress=False)
    assert checkpoint.load_state(without)["augment_probability"] == probability
    again = train(replace(recipe, steps=5), resumed, progress=False)
    moved = checkpoint.load_state(again)["augment_probability"]
    assert abs(moved - probability) == pytest.approx(2 * 4 / 40) or moved == pytest.approx(probability)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 1.0}, r"ada\.target is 1\.0; it must be in \[0, 1\)"),
        ({"images": 0}, r"ada\.images is 0"),
        ({"policy": ("blit",)}, "augment names 'blit'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
