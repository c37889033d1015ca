"""Generators with a mapping network: truncation, a w for every block, style mixing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from gans.commands.generators import latents, render, to_codes
from tests.gans.style_generators import CONFIGS, generator_of


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_truncation_goes_towards_the_mean(config):
    generator, z = generator_of(config), torch.randn(3, 6).double()
    torch.testing.assert_close(generator.synthesize(generator.map_latents(z)), generator(z))
    mean = generator.mean_latent()
    fixed = torch.randn(4096, 6, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(mean, generator.mapping(fixed).mean(0, keepdim=True))
    torch.testing.assert_close(generator.map_latents(z, truncation=0.0), mean.expand(3, -1))
    half = generator.map_latents(z, truncation=0.5)
    torch.testing.assert_close(half - mean, 0.5 * (generator.map_latents(z) - mean))
    assert not torch.equal(generator.synthesize(half), generator(z))


def test_style_mixing_gives_each_block_its_own_w(config):
    generator, blocks = generator_of(config), config.blocks
    first, second = (generator.map_latents(torch.randn(2, 6).double()) for _ in range(2))
    images = [generator.synthesize(generator.mix_styles(first, second, at)) for at in range(blocks + 1)]
    torch.testing.assert_close(images[0], generator.synthesize(second))
    torch.testing.assert_close(images[blocks], generator.synthesize(first))
    for here, there in pairwise(images):  # every block's w counts
        assert (here - there).abs().max() > 1e-4
    each = generator.mix_styles(first, second, torch.tensor([2, 1]))
    for image, crossover in ((0, 2), (1, 1)):
        own = (each[image] == first[image]).all(1)
        assert own.tolist() == [block < crossover for block in range(blocks)]


def test_style_mixing_in_training_only(config):
    plain, mixing = generator_of(config), generator_of(replace(config, style_mixing=1.0))
    z = torch.randn(4, 6).double()
    torch.testing.assert_close(plain(z), mixing(z))
    mixing.train()
    seen = []
    mixing.synthesize, synthesize = seen.append, mixing.synthesize
    for _ in range(8):
        mixing(z)
    own = mixing.mapping(z)[:, None]
    for w in seen:
        assert w.shape == (4, config.blocks, config.style_dim)
        kept = (w == own).all(-1)
        assert kept[:, 0].all() and not kept[:, -1].any()
        assert (kept.int().diff(dim=1) <= 0).all()  # one crossover
    assert len({tuple((w == own).all(-1).sum(1).tolist()) for w in seen}) > 1
    never = generator_of(replace(config, style_mixing=1e-9)).train()
    torch.testing.assert_close(never(z), plain(z))
    size = config.image_size
    assert synthesize(own[:, 0]).shape == (4, 3, size, size)


def test_the_tools_find_the_mapping_network(config):
    generator = generator_of(config).float().requires_grad_(False)
    w = generator.map_latents(latents([4, 7], 6), truncation=0.5)
    (images,) = render(generator, [4, 7], truncation=0.5)
    torch.testing.assert_close(images, generator.synthesize(w).clamp(-1, 1))
    torch.testing.assert_close(to_codes(generator, latents([4, 7], 6), space="w", truncation=0.5), w)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style_mixing": 1.5}, r"generator.style_mixing is 1.5; it must be in \[0, 1\]"),
        ({"latent_dim": 0}, "generator.latent_dim is 0"),
        ({"mapping_depth": 0}, "generator.mapping_depth is 0"),
        ({"mapping_lr_multiplier": 0.0}, "generator.mapping_lr_multiplier is 0.0; it must be positive"),
    ],
)
def test_bad_configurations_name_the_field(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


@pytest.mark.parametrize("shape", [(2, 9, 6), (2, 3, 5), (2, 5), (6,)])
def test_w_of_a_wrong_shape_is_named(config, shape):
    blocks, dim = config.blocks, config.style_dim
    with pytest.raises(ValueError) as error:
        generator_of(config).synthesize(torch.zeros(shape).double())
    assert str(error.value) == f"w must be (B, {dim}) or (B, {blocks}, {dim}), got {shape}"
