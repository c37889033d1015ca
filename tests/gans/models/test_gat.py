from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import natten_ext
from gans.common import rng
from gans.common.distributed import World
from gans.losses.adversarial import GANLoss, LossConfig
from gans.models.augment import AUGMENTATIONS, augment_alike, diff_augment
from gans.models.gat import Discriminator, GATDiscriminatorConfig, GATGeneratorConfig, Generator
from gans.models.gat_layers import RotaryAttention, noise_shares, perturb, rotate, sincos_positions
from gans.models.vitgan import ViTDiscriminatorConfig, ViTGeneratorConfig
from gans.recipes.config import RunConfig, TrainConfig
from gans.recipes.presets_gat import PRESETS
from gans.training import logs
from gans.training.loop import train
from gans.training.recompute import recompute_blocks
from gans.training.steps import discriminator_step, generator_step, make_networks

SIZES = {"image_size": 8, "channels": 1, "patch_size": 2, "dim": 16, "depth": 4, "heads": 2, "levels": 2}
GENERATOR = GATGeneratorConfig(**SIZES, latent_dim=5)
DISCRIMINATOR = GATDiscriminatorConfig(**SIZES)
EXACT = LossConfig(adversarial="relativistic", gp_weight=0, drift=0, r1=1, r2=1)


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_and_sizes_of_every_preset(name):
    recipe = PRESETS[name].recipe
    size, channels = recipe.generator.image_size, recipe.generator.channels
    with torch.device("meta"), natten_ext.use_backend("reference"):
        generator, discriminator = Generator(recipe.generator), Discriminator(recipe.discriminator)
        images = generator(torch.randn(2, 64), levels=True)
        assert images.shape == (2, 4 * channels, size, size)
        assert generator(torch.randn(2, 64)).shape == (2, channels, size, size)
        for shown in (images, images[:, :channels]):
            assert discriminator(shown, augment=False).shape == (2,)
    if name == "gat-digits":
        assert (size, channels, recipe.generator.side**2) == (16, 1, 16)
    elif name != "gat32-small":
        assert recipe.generator.side**2 == 256 and recipe.lr_g == pytest.approx(4e-4)


def test_attention_norms_and_turns_queries_and_keys():
    """Against complex numbers: pairs of channels turn by row and column at 1 and 1/100, but for the class token."""
    torch.manual_seed(0)
    module = RotaryAttention(16, 2, side=3).double()
    for norm in (module.query_norm, module.key_norm):
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    query, key, value = (part.view(2, 10, 2, 8) for part in module.qkv(x).split(16, dim=-1))
    row, column = torch.arange(9, dtype=torch.float64) // 3, torch.arange(9, dtype=torch.float64) % 3
    angles = torch.stack([row, row / 100, column, column / 100], dim=1)
    turns = torch.cat([torch.ones(1, 4), torch.exp(1j * angles)])[:, None]

    def placed(norm, y):
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (4, 2)).contiguous()) * turns).flatten(-2)

    query, key = placed(module.query_norm, query), placed(module.key_norm, key)
    weights = torch.einsum("bnhc,bmhc->bhnm", query, key).div(8**0.5).softmax(-1)
    expected = module.proj(torch.einsum("bhnm,bmhc->bnhc", weights, value).flatten(-2))
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)  # angles are kept in float32
    torch.testing.assert_close(module.attention_weights(x, [4])[:, 0], weights[:, :, 4], rtol=1e-6, atol=1e-6)


def test_positions():
    table = sincos_positions(3, 8)
    assert table.shape == (9, 8)
    for place in range(9):
        turns = torch.tensor([[axis, axis / 100] for axis in (place % 3, place // 3)])
        expected = torch.cat([turns.sin(), turns.cos()], dim=1).flatten()
        torch.testing.assert_close(table[place], expected)
    x = torch.randn(1, 9, 1, 8)
    torch.testing.assert_close(rotate(x, torch.zeros(9, 4)), x)


def test_noise_of_the_levels_is_one_diffusion():
    """1 percent in the last, 88.5 in the first; what a level adds to the one after it is independent of it."""
    assert noise_shares(4, 0.125) == pytest.approx([0.885, 0.76, 0.51, 0.01])
    assert noise_shares(1, 0.125) == pytest.approx([0.01])
    torch.manual_seed(0)
    zeros = torch.zeros(4, 1, 200, 200)
    noise = perturb([zeros] * 4, 0.125)
    for level, share in zip(noise, noise_shares(4, 0.125), strict=True):
        assert level.std().item() == pytest.approx(share, rel=0.01)
    kept = (1 - 0.76) / (1 - 0.51)
    added = (noise[1] - kept * noise[2]).flatten()
    assert torch.corrcoef(torch.stack([added, noise[2].flatten()]))[0, 1].abs() < 0.02
    torch.manual_seed(1)
    shifted = perturb([zeros + 1] * 4, 0.125)
    torch.manual_seed(1)
    for one, other, share in zip(shifted, perturb([zeros] * 4, 0.125), noise_shares(4, 0.125), strict=True):
        torch.testing.assert_close(one - other, zeros + 1 - share)


def test_levels_are_sums_and_the_last_is_the_image():
    torch.manual_seed(0)
    generator, z = Generator(GENERATOR), torch.randn(3, 5)
    images = generator(z, levels=True)
    assert torch.equal(generator(z), images[:, 1:])
    with torch.no_grad():
        generator.to_image[1].linear.weight.zero_()
        assert torch.equal(generator(z, levels=True)[:, 1:], images[:, :1])


def test_levels_of_an_image_are_augmented_alike():
    x = torch.rand(6, 3, 8, 8) * 2 - 1
    policy = ("color_0.5", "translation_0.125", "cutout_1.0", "flip_0.4")
    torch.manual_seed(2)
    first, second = augment_alike([x, x.clone()], policy)
    assert torch.equal(first, second) and not torch.equal(first, x)
    torch.manual_seed(2)
    assert torch.equal(second, diff_augment(x, policy))
    many = x.repeat(100, 1, 1, 1)
    for name, share in (("color_0.5", 0.5), ("flip_0.4", 0.4)):
        changed = (AUGMENTATIONS[name](many) != many).flatten(1).any(1)
        assert changed.float().mean().item() == pytest.approx(share, abs=0.05)


def test_a_real_image_is_every_level():
    torch.manual_seed(0)
    discriminator, x = Discriminator(DISCRIMINATOR), torch.rand(4, 1, 8, 8)
    torch.manual_seed(3)
    score = discriminator(x)
    torch.manual_seed(3)
    torch.testing.assert_close(discriminator(x.repeat(1, 2, 1, 1)), score)
    with pytest.raises(ValueError, match=r"images must have 1 channels, or those of 2 levels, got \(4, 3, 8, 8\)"):
        discriminator(torch.rand(4, 3, 8, 8))


def loss_gradients(discriminator, loss, real, fake, backend):
    discriminator.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with natten_ext.use_backend(backend):
        terms = loss.discriminator(discriminator, real, fake)
        terms |= loss.discriminator_penalty(discriminator, real, fake, step=0)
        torch.stack(list(terms.values())).sum().backward()
    return {name: p.grad.clone() for name, p in discriminator.named_parameters()}


def scattered(config):
    torch.manual_seed(0)
    discriminator = Discriminator(config).double()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return discriminator


@pytest.mark.parametrize("mode", ["exact", "finite-difference", "jvp"])
def test_parameter_gradients_through_the_fused_derivatives(mode):
    """Every parameter gradient of the whole loss: the default backend against naive attention, in float64."""
    discriminator = scattered(DISCRIMINATOR)
    real, fake = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    loss = GANLoss(replace(EXACT, penalty_mode=mode))
    expected = loss_gradients(discriminator, loss, real, fake, "reference")
    for name, gradient in loss_gradients(discriminator, loss, real, fake, "auto").items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_generator_gradients_through_the_fused_backward():
    torch.manual_seed(0)
    generator, z = Generator(GENERATOR).double(), torch.randn(3, 5).double()
    gradients = []
    for backend in ("reference", "auto"):
        generator.zero_grad()
        with natten_ext.use_backend(backend):
            generator(z, levels=True).square().sum().backward()
        gradients.append([p.grad.clone() for p in generator.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_parts_of_a_batch_and_recomputed_blocks_change_nothing():
    """Augmentation and noise belong to images."""
    discriminator = scattered(DISCRIMINATOR)
    real, fake = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.randn(4, 2, 8, 8, dtype=torch.float64)
    loss = GANLoss(EXACT)

    def gradients(*parts):
        discriminator.zero_grad(set_to_none=True)
        for start, stop in parts:
            with rng.part(7, 4, start, stop):
                pair = real[start:stop], fake[start:stop]
                terms = loss.discriminator(discriminator, *pair)
                terms |= loss.discriminator_penalty(discriminator, *pair, step=0)
            (torch.stack(list(terms.values())).sum() / len(parts)).backward()
        return [p.grad.clone() for p in discriminator.parameters()]

    whole, parts = gradients((0, 4)), gradients((0, 2), (2, 4))
    assert recompute_blocks(discriminator) == 4 and recompute_blocks(Generator(GENERATOR)) == 4
    for expected, halves, recomputed in zip(whole, parts, gradients((0, 4)), strict=True):
        torch.testing.assert_close(halves, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(recomputed, expected, rtol=1e-9, atol=1e-11)


def test_training_shows_the_discriminator_all_levels(tmp_path, monkeypatch):
    seen = set()
    forward = Discriminator.forward
    monkeypatch.setattr(Discriminator, "forward", lambda self, x, **k: seen.add(x.shape[1]) or forward(self, x, **k))
    recipe = replace(
        PRESETS["gat32-small"].recipe, generator=GENERATOR, discriminator=DISCRIMINATOR, steps=2, batch_d=4, batch_g=4
    )
    run = RunConfig(data="digits", out=str(tmp_path), sample_count=4, log_every=1, metric_every=2, metric_images=20)
    train(recipe, run, progress=False)
    assert seen == {1, 2}
    lines = [line for line in logs.read(tmp_path) if "generator/adversarial" in line]
    assert {"discriminator/r1", "discriminator/r2"} <= lines[0].keys() and len(lines) == 2


@pytest.mark.parametrize(
    ("generator", "discriminator"),
    [
        (GENERATOR, ViTDiscriminatorConfig(image_size=8, channels=1, patch_size=4, dim=12, depth=1, heads=3)),
        (ViTGeneratorConfig(image_size=8, channels=1, patch_size=4, dim=12, depth=1, heads=3), DISCRIMINATOR),
    ],
    ids=["its generator", "its discriminator"],
)
def test_with_another_network(generator, discriminator):
    recipe = TrainConfig(generator=generator, discriminator=discriminator, n_critic=1, batch_d=4, batch_g=4)
    alone = World(torch.device("cpu"))
    networks, real = make_networks(recipe, alone.device), torch.rand(4, 1, 8, 8)
    logged = discriminator_step(0, 0, recipe, networks, real, alone)
    assert logged["discriminator/penalty"] > 0  # one image each: WGAN-GP has something to mix
    generator_step(0, recipe, networks, None, alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": 3}, "generator.levels is 3; it must divide the depth, 4"),
        ({"heads": 8}, "generator.dim is 16; positions on two axes need a multiple of 4 times 8 heads"),
        ({"patch_size": 3}, "generator.patch_size is 3"),
        ({"mapping_depth": 0}, "generator.mapping_depth is 0"),
    ],
)
def test_bad_generators(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GENERATOR, **change)


def test_bad_recipes():
    with pytest.raises(ValueError, match=r"discriminator.information is 0; it must be in"):
        replace(DISCRIMINATOR, information=0)
    recipe = replace(PRESETS["gat32-small"].recipe, generator=GENERATOR, discriminator=DISCRIMINATOR)
    with pytest.raises(ValueError, match=r"generator.levels is 4 and discriminator.levels is 2; they must agree"):
        replace(recipe, generator=replace(GENERATOR, levels=4))
    with pytest.raises(ValueError, match=r"loss.gp_weight is 10.0, and WGAN-GP's penalty mixes real images"):
        replace(recipe, loss=LossConfig())


def test_initial_scales():
    """Gates near 0, branches of the discriminator at a tenth."""
    torch.manual_seed(0)
    generator, discriminator = Generator(GATGeneratorConfig()), Discriminator(GATDiscriminatorConfig(depth=4))
    w = generator.map_latents(torch.randn(64, 64))
    assert 0.1 < w.std() < 1
    gates = generator.blocks[0].modulation(w)[1]
    assert gates.std() < 0.1
    assert all((block.scale1 == 0.1).all() for block in discriminator.blocks)
    assert discriminator(torch.rand(4, 3, 32, 32)).abs().max() < 5
