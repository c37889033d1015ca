from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import natten_ext
from gans.layers import ScaleFreeRMSNorm, TokenNoise
from gans.presets import PRESETS, preset
from gans.registry import build
from gans.transgan import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig

# Parameters of the published checkpoints: all floating-point entries, integer index buffers not counted.
PUBLISHED = {"cifar10": (83_312_495, 10_210_400), "stl10": (168_466_623, 10_341_536)}


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    recipe = preset(name)
    with torch.device("meta"):
        counts = count(Generator(recipe.generator)), count(Discriminator(recipe.discriminator))
    assert counts == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_of_every_preset(name):
    recipe = preset(name)
    with torch.device("meta"):
        generator = build(recipe.generator)
        discriminator = build(replace(recipe.discriminator, augment=()))  # random choices need real numbers
    with FakeTensorMode(allow_non_fake_inputs=True), natten_ext.use_backend("reference"):
        generator.to_empty(device="cpu")
        discriminator.to_empty(device="cpu")
        images = generator(torch.randn(2, recipe.generator.latent_dim))
        scores = discriminator(images)
    size = recipe.generator.image_size
    assert images.shape == (2, recipe.generator.channels, size, size)
    assert scores.shape == (2,)


def test_stages_attend_within_their_windows(tiny):
    """With 2x2 windows in a one-stage generator a pixel depends on its own window only."""
    config = replace(tiny.generator, base_size=4, depths=(1,), windows=(2,), noise=False)
    generator = Generator(config).double()
    generator.input = torch.nn.Identity()
    x = torch.randn(1, 4 * 4 * config.base_dim, dtype=torch.float64, requires_grad=True)
    generator(x)[0, :, 0, 0].sum().backward()
    reached = x.grad.view(4, 4, -1).abs().amax(-1) > 0
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, :2] = True
    assert torch.equal(reached, expected)


def test_rms_norm_by_definition():
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    expected = x / torch.sqrt((x**2).sum(-1, keepdim=True) / 7 + 1e-8)
    torch.testing.assert_close(ScaleFreeRMSNorm()(x), expected)
    assert torch.isfinite(ScaleFreeRMSNorm()(torch.zeros(2, 4))).all()


def test_noise_is_one_number_a_token_and_starts_at_zero():
    noise = TokenNoise()
    x = torch.randn(2, 4, 4, 6)
    assert torch.equal(noise(x), x)
    noise.strength.data.fill_(0.5)
    added = noise(x) - x
    torch.testing.assert_close(added, added[..., :1].expand_as(added), atol=1e-6, rtol=0)
    assert added[..., 0].unique().numel() == 32


def test_discriminator_noise_is_learned(tiny):
    discriminator = Discriminator(replace(tiny.discriminator, augment=()))
    discriminator(torch.randn(2, 1, 8, 8)).sum().backward()
    strengths = [p for name, p in discriminator.named_parameters() if name.endswith("noise.strength")]
    assert len(strengths) == 3
    assert all(p.grad is not None and p.grad != 0 for p in strengths)


def test_initialisation(tiny):
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig()).requires_grad_(False)
    for name, module in discriminator.named_modules():
        if isinstance(module, torch.nn.Linear) and module.weight.numel() > 1000:
            assert abs(float(module.weight.std()) - 0.02) < 0.001, name
            assert module.bias is None or not module.bias.any(), name
    for stage in discriminator.stages:
        for block in stage:
            assert abs(float(block.attn.rel_pos_bias.std()) - 0.02) < 0.003
            assert block.attn.qkv.bias is None
    assert abs(float(discriminator.pos_embed[0].std()) - 0.02) < 0.001
    bound = (6 / (3 * 4 + 288 * 4)) ** 0.5  # Xavier uniform of the first patch embedding
    largest = float(discriminator.patches[0].weight.abs().max())
    assert 0.98 * bound < largest <= bound

    generator = Generator(GeneratorConfig(base_dim=64, depths=(1, 1, 1)))
    weight = generator.stages[0][0].mlp.fc1.weight.detach()
    assert abs(float(weight.std()) - (1 / (3 * 64)) ** 0.5) < 0.003  # PyTorch's own: U(-1/8, 1/8) for 64 inputs


def test_stl10_uses_scale_free_norms_and_cifar10_layer_norms():
    with torch.device("meta"):
        for name, kind in (("cifar10", torch.nn.LayerNorm), ("stl10", ScaleFreeRMSNorm)):
            recipe = preset(name)
            for model in (build(recipe.generator), build(recipe.discriminator)):
                norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | ScaleFreeRMSNorm)]
                assert norms and all(isinstance(norm, kind) for norm in norms)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (GeneratorConfig, {"windows": (8, 16)}, "generator.windows"),
        (GeneratorConfig, {"windows": (8, 16, 24)}, "does not divide its map of 32x32"),
        (GeneratorConfig, {"base_dim": 24}, "generator.base_dim is 24"),
        (GeneratorConfig, {"heads": 3}, "generator.heads is 3"),
        (GeneratorConfig, {"channels": 4}, "generator.channels is 4"),
        (GeneratorConfig, {"latent_dim": 0}, "generator.latent_dim is 0"),
        (GeneratorConfig, {"depths": (5, -1, 2)}, "generator.depths"),
        (GeneratorConfig, {"depths": (), "windows": ()}, "generator.depths and"),
        (DiscriminatorConfig, {"image_size": 30}, "discriminator.image_size is 30"),
        (DiscriminatorConfig, {"channels": 2}, "discriminator.channels is 2"),
        (DiscriminatorConfig, {"depths": (3,)}, "discriminator.depths"),
        (DiscriminatorConfig, {"last_depth": 0}, "discriminator.last_depth is 0"),
        (DiscriminatorConfig, {"augment": ("colour",)}, "'colour'"),
        (DiscriminatorConfig, {"patch_dims": (), "depths": (), "windows": ()}, "discriminator.depths and"),
    ],
)
def test_bad_configurations_name_the_field(kind, change, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace("(", r"\(")):
        kind(**change)
