"""Every loss with every discriminator: it trains, or the recipe is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gans.commands.train import parse
from gans.common.distributed import World
from gans.losses.adversarial import ADVERSARIAL, LossConfig
from gans.models.gat import GATDiscriminatorConfig
from gans.models.projected import ProjectedDiscriminatorConfig
from gans.models.stylenat_discriminator import StyleNATDiscriminatorConfig
from gans.models.transgan import DiscriminatorConfig, GeneratorConfig
from gans.models.vitgan import ViTDiscriminatorConfig
from gans.recipes.named import preset
from gans.training.steps import backward, discriminator_step, generator_step, make_networks

ALONE = World(torch.device("cpu"))
GENERATOR = GeneratorConfig(latent_dim=6, base_dim=64, depths=(1, 1, 1), windows=(4, 4, 4), heads=2)
DISCRIMINATORS = {
    "transgan": DiscriminatorConfig(patch_dims=(12, 4), depths=(1, 1), windows=(4, 2), heads=2),
    "vitgan": ViTDiscriminatorConfig(dim=12, depth=1, heads=3),
    "stylenat": StyleNATDiscriminatorConfig(image_size=32, width=128, max_dim=16, group=2),
    "gat": GATDiscriminatorConfig(patch_size=8, dim=12, depth=1, heads=3, levels=1),
    "projected": ProjectedDiscriminatorConfig(image_size=32, features="random", feature_size=128, width=8),
}


@pytest.mark.parametrize("adversarial", ADVERSARIAL)
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_every_term_with_every_discriminator(name, adversarial):
    """All terms at once, one update of each network."""
    loss = LossConfig(
        adversarial=adversarial, r1=1, r2=1, bcr_real=1, bcr_fake=1, bcr_against="augmented", out_of_range=1
    )
    recipe = replace(
        preset("cifar10-small"),
        generator=GENERATOR,
        discriminator=DISCRIMINATORS[name],
        loss=loss,
        batch_d=4,
        batch_g=4,
    )
    networks = make_networks(recipe, ALONE.device)
    real = torch.rand(4, 3, 32, 32) * 2 - 1
    logged = discriminator_step(0, 0, recipe, networks, real, ALONE)
    logged |= generator_step(0, recipe, networks, real, ALONE)
    terms = {"adversarial", "drift", "bcr", "penalty", "r1", "r2", "gradient_norm"}
    assert logged.keys() == {f"discriminator/{term}" for term in terms} | {
        f"generator/{term}" for term in ("adversarial", "out_of_range", "gradient_norm")
    }
    assert all(number > 0 for key, number in logged.items() if not key.endswith("adversarial"))


def test_a_projected_discriminator_takes_the_loss_of_another_preset():
    """What the command line makes of it when nobody names a loss: WGAN-GP with drift, over 32 logits an image."""
    arguments = "--data x --out y --preset cifar10-small --discriminator projected32-small --batch-d 2"
    recipe = parse([*arguments.split(), "--discriminator.features", "random"]).recipe
    assert recipe.loss.drift and recipe.loss.gp_weight
    networks = make_networks(recipe, ALONE.device)
    logged = discriminator_step(0, 0, recipe, networks, torch.rand(2, 3, 32, 32) * 2 - 1, ALONE)
    assert logged["discriminator/drift"] > 0


def test_a_term_that_is_no_scalar_is_named():
    with pytest.raises(ValueError, match=r"the loss term 'own' has shape \(3,\); a term is a scalar"):
        backward({"good": torch.ones((), requires_grad=True), "own": torch.ones(3, requires_grad=True)}, 1, {})
