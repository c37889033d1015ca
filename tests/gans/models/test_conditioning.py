"""Networks with classes: every kind, what a label changes, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gans.common.distributed import World
from gans.losses.adversarial import LossConfig
from gans.losses.path_length import PathLengthLossConfig
from gans.models.conditioning import ClassScore, LatentAndClass, bind
from gans.models.fastgan import FastGANGeneratorConfig
from gans.models.gat import GATDiscriminatorConfig, GATGeneratorConfig
from gans.models.projected import ProjectedDiscriminatorConfig
from gans.models.stylenat import StyleNATGeneratorConfig
from gans.models.stylenat_discriminator import StyleNATDiscriminatorConfig
from gans.models.transgan import DiscriminatorConfig, GeneratorConfig
from gans.models.vitgan import ViTDiscriminatorConfig, ViTGeneratorConfig
from gans.recipes.config import TrainConfig
from gans.recipes.registry import CHOICES, build
from gans.training.steps import discriminator_gradients, discriminator_step, generator_step, make_networks

ALONE = World(torch.device("cpu"))
PATCHES = {"image_size": 32, "patch_size": 8, "dim": 12, "depth": 2, "heads": 3, "classes": 3}
GENERATORS = {
    "transgan": GeneratorConfig(latent_dim=6, base_dim=64, depths=(1, 1, 1), windows=(4, 4, 4), heads=2, classes=3),
    "vitgan": ViTGeneratorConfig(**PATCHES, latent_dim=6, implicit_dim=8, mapping_depth=2),
    "stylenat": StyleNATGeneratorConfig(
        latent_dim=6, dims=(16, 16, 16, 8), dilations=("1", "1", "1"), kernel_size=3, mapping_depth=2, classes=3
    ),
    "fastgan": FastGANGeneratorConfig(latent_dim=6, image_size=32, width=8, lite=True, skip_ratio=8, classes=3),
    "gat": GATGeneratorConfig(**PATCHES, latent_dim=6, levels=2),
}
DISCRIMINATORS = {
    "transgan": DiscriminatorConfig(patch_dims=(12, 4), depths=(1, 1), windows=(4, 2), heads=2, augment=(), classes=3),
    "vitgan": ViTDiscriminatorConfig(**PATCHES, augment=()),
    "stylenat": StyleNATDiscriminatorConfig(image_size=32, width=128, max_dim=16, group=2, classes=3),
    "projected": ProjectedDiscriminatorConfig(
        features="random", image_size=32, feature_size=128, width=8, augment=(), pixel_width=4, classes=3
    ),
    "gat": GATDiscriminatorConfig(**PATCHES, levels=2, class_dim=8, augment=()),
}
LOSS = LossConfig(adversarial="relativistic", gp_weight=0, drift=0, r1=1, r2=1)
LABELS = torch.tensor([0, 2, 1, 2])


def test_every_kind_has_classes():
    assert GENERATORS.keys() == CHOICES["generator"].keys() and DISCRIMINATORS.keys() == CHOICES["discriminator"].keys()


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_shows_the_class_of_each_image(name):
    torch.manual_seed(0)
    generator = build(GENERATORS[name]).eval()
    z = torch.randn(1, 6).expand(4, -1)
    images = generator(z, LABELS)
    assert images.shape == (4, 3, 32, 32)
    torch.testing.assert_close(images[1], images[3])  # one z and one class
    assert not torch.allclose(images[0], images[1]) and not torch.allclose(images[1], images[2])
    with pytest.raises(ValueError, match="labels is None; it needs labels, for the network was made for 3 classes"):
        generator(z)
    plain = build(replace(GENERATORS[name], classes=0))
    with pytest.raises(ValueError, match="it needs no labels"):
        plain(z, LABELS)
    assert set(generator.state_dict()) - set(plain.state_dict()) in (
        {"latent.embedding.weight"},
        {"mapping.latent.embedding.weight"},
    )


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_discriminator_scores_the_class_of_each_image(name):
    torch.manual_seed(0)
    discriminator = build(DISCRIMINATORS[name]).eval()
    images = torch.rand(1, 3, 32, 32).expand(4, -1, -1, -1)
    torch.manual_seed(1)
    scores = discriminator(images, LABELS)
    torch.manual_seed(1)
    others = discriminator(images, LABELS.roll(1))
    assert scores.shape[0] == 4 and scores.shape == others.shape
    assert ((scores - others).reshape(4, -1).abs().amax(1) > 1e-7).tolist() == [True] * 4
    with pytest.raises(ValueError, match="it needs labels, for the network was made for 3 classes"):
        discriminator(images)
    with pytest.raises(ValueError, match="it needs no labels"):
        build(replace(DISCRIMINATORS[name], classes=0))(images, LABELS)


@pytest.mark.parametrize(
    ("generator", "discriminator"),
    [*zip(GENERATORS, ("transgan", "vitgan", "stylenat", "projected", "gat"), strict=True)],
)
def test_an_update_of_both_trains_the_classes_in_the_batch(generator, discriminator):
    """R1 and R2 too, where the class's vector is in the double backward; class 1 is not in the batch."""
    recipe = TrainConfig(
        generator=GENERATORS[generator],
        discriminator=DISCRIMINATORS[discriminator],
        loss=LOSS,
        n_critic=1,
        batch_d=4,
        batch_g=4,
        clip=0,
    )
    networks, real, labels = make_networks(recipe, ALONE.device), torch.rand(4, 3, 32, 32), torch.tensor([0, 2, 2, 0])
    tables = {
        name: module.weight
        for model in (networks.generator, networks.discriminator)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    }
    before = {name: table.detach().clone() for name, table in tables.items()}
    logged = discriminator_step(0, 0, recipe, networks, real, ALONE, labels=labels)
    assert {"discriminator/r1", "discriminator/r2"} <= logged.keys()
    for _ in range(2):  # with a gate at 0 nothing of the class arrives in the first
        generator_step(0, recipe, networks, real, ALONE, labels=labels)
    assert len(tables) >= 2
    for name, table in tables.items():
        moved = (table.detach() - before[name]).abs().amax(1) > 0
        assert moved.tolist() == [True, False, True], name


def test_labels_follow_the_parts_of_a_batch():
    recipe = TrainConfig(
        generator=GENERATORS["transgan"],
        discriminator=replace(DISCRIMINATORS["transgan"], augment=("translation", "color")),
        loss=LOSS,
        n_critic=1,
        batch_d=4,
        batch_g=4,
        precision="fp64",
    )
    real = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    gradients = []
    for accumulate in (1, 2):
        networks = make_networks(recipe, ALONE.device)
        split = replace(recipe, accumulate=accumulate)
        discriminator_gradients(0, 0, split, networks, real, ALONE, labels=LABELS)
        gradients.append([p.grad for p in networks.discriminator.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_path_length_and_truncation_know_the_class():
    torch.manual_seed(0)
    recipe = TrainConfig(
        generator=replace(GENERATORS["stylenat"], style_mixing=0.9),
        discriminator=DISCRIMINATORS["stylenat"],
        loss=PathLengthLossConfig(path_length_every=1),
        n_critic=1,
        batch_d=4,
        batch_g=4,
    )
    networks = make_networks(recipe, ALONE.device)
    assert generator_step(0, recipe, networks, None, ALONE, labels=LABELS)["generator/path_length"] > 0
    generator, z = networks.generator.eval(), torch.randn(4, 6)
    means = generator.mean_latent(LABELS)
    torch.testing.assert_close(means[1], means[3])
    assert not torch.allclose(means[0], means[1])
    bound = bind(generator, LABELS)
    torch.testing.assert_close(bound.map_latents(z, truncation=0.0), means)
    torch.testing.assert_close(bound.synthesize(bound.map_latents(z)), bound(z))


def test_by_formula():
    torch.manual_seed(0)
    latent, score = LatentAndClass(3, 4), ClassScore(3, 4)
    z, features = torch.randn(2, 2, 4).unbind(0)
    labels = torch.tensor([2, 0])
    joined = latent(z, labels)
    assert torch.equal(joined[:, :4], z)
    torch.testing.assert_close(joined[:, 4:].square().mean(1), torch.ones(2))
    torch.testing.assert_close(joined[:, 4:], torch.nn.functional.normalize(latent.embedding.weight[labels]) * 2)
    expected = (torch.nn.functional.normalize(score.embedding.weight[labels]) * features).sum(1)
    torch.testing.assert_close(score(features, labels), expected)


def test_bad_classes():
    for name, owner in (
        *((c, "generator") for c in GENERATORS.values()),
        *((c, "discriminator") for c in DISCRIMINATORS.values()),
    ):
        with pytest.raises(ValueError, match=rf"{owner}\.classes is 1; it must be 0, for none, or at least 2"):
            replace(name, classes=1)
    with pytest.raises(ValueError, match=r"generator\.classes is 3 and discriminator\.classes is 0; they must agree"):
        TrainConfig(generator=GENERATORS["transgan"])
