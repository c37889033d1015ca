"""The projected discriminator: features, mixing, discriminators, and every generator of the package against it."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gans.features import by_name, lite1
from gans.features.by_name import make_maps
from gans.features.network import STRIDES, MapNetwork
from gans.losses.adversarial import GANLoss
from gans.models.fastgan import FastGANGeneratorConfig
from gans.models.projected import Discriminator, ProjectedDiscriminatorConfig, Projection
from gans.models.spectral_norm import SpectralConv2d
from gans.models.stylenat import StyleNATGeneratorConfig
from gans.models.transgan import GeneratorConfig
from gans.models.vitgan import ViTGeneratorConfig
from gans.recipes.named import preset
from gans.recipes.registry import build

TINY = ProjectedDiscriminatorConfig(image_size=32, features="random", feature_size=128)


def test_lite1_maps_are_those_of_the_network():
    maps_of = make_maps("lite1")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    found = maps_of(images)
    assert [tuple(x.shape[1:]) for x in found] == [(24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    network = lite1.load_lite1()
    last = network._swish(network._bn1(network._conv_head(found[-1])))
    torch.testing.assert_close(last, network.extract_features(images))


@pytest.mark.parametrize("name", ["lite1", "random"])
def test_features_are_frozen_and_pass_gradients_on(name):
    model = Discriminator(replace(TINY, features=name)).train()
    assert not any(module.training for module in model.features.modules())
    assert all(module.training for module in model.discriminators.modules())
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {n for n, _ in model.named_parameters() if n.startswith(("features.", "projection."))}
    before = {n: t.clone() for n, t in model.features.state_dict().items()}
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.abs().max() > 0
    assert all(torch.equal(t, before[n]) for n, t in model.features.state_dict().items())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_digits_are_grey_images_of_the_smallest_size():
    recipe = preset("projected-digits")
    with torch.no_grad():
        images = build(recipe.generator)(torch.randn(2, recipe.generator.latent_dim))
        scores = Discriminator(replace(recipe.discriminator, features="random"))(images)
    assert images.shape == (2, 1, 32, 32)
    assert scores.shape == (2, 4 * 1 + 25)  # one logit a scale at 128 px, and those of the pixels


def test_projection_by_definition():
    projection = Projection((3, 5, 6, 7)).double()
    assert not any(p.requires_grad for p in projection.parameters())
    maps = [torch.randn(2, c, 32 // 2**i, 32 // 2**i).double() for i, c in enumerate((3, 5, 6, 7))]
    mixed = projection(maps)
    assert [tuple(x.shape[1:]) for x in mixed] == [(64, 64, 64), (64, 32, 32), (128, 16, 16), (256, 8, 8)]

    def conv(layer, x):
        return torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], x) + layer.bias[:, None, None]

    def enlarge(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    coarse = conv(projection.across_scales[3], enlarge(conv(projection.across_channels[3], maps[3])))
    torch.testing.assert_close(mixed[3], coarse)
    for level in (2, 1, 0):
        coarse = conv(
            projection.across_scales[level], enlarge(conv(projection.across_channels[level], maps[level]) + coarse)
        )
        torch.testing.assert_close(mixed[level], coarse)


def test_four_discriminators_of_published_widths():
    model = Discriminator(replace(TINY, image_size=224, feature_size=224)).eval()
    convs = [[m for m in scores.modules() if isinstance(m, SpectralConv2d)] for scores in model.discriminators]
    widths = [[conv.in_channels for conv in scale] for scale in convs]
    narrow = Discriminator(replace(TINY, width=16)).discriminators[2]
    assert [m.in_channels for m in narrow.modules() if isinstance(m, SpectralConv2d)] == [128, 64, 128]
    assert widths == [[64, 64, 128, 256, 512], [64, 128, 256, 512], [128, 256, 512], [256, 512]]
    assert all(conv.kernel_size == (4, 4) for scale in convs for conv in scale)
    seen = []
    for scores in model.discriminators:
        scores.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    logits = model(torch.rand(2, 3, 224, 224))
    assert seen == [(1, 4, 4)] * 4 and logits.shape == (2, 64)


def test_small_images_are_augmented_and_then_enlarged():
    model = Discriminator(TINY).eval()
    seen = []
    model.features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.rand(3, 3, 32, 32)
    clean = model(images, augment=False)
    torch.testing.assert_close(seen[0], F.interpolate(images, (128, 128), mode="bilinear", align_corners=False))
    assert torch.equal(model(images, augment=False), clean)
    assert not torch.equal(model(images), clean)
    large = Discriminator(replace(TINY, image_size=160)).eval()
    large.features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    large(images := torch.rand(1, 3, 160, 160), augment=False)
    assert torch.equal(seen[-1], images)


def test_grey_images_are_seen_as_colour():
    torch.manual_seed(0)
    grey = Discriminator(replace(TINY, channels=1)).eval()
    torch.manual_seed(0)
    colour = Discriminator(TINY).eval()
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey(images, augment=False), colour(images.expand(-1, 3, -1, -1), augment=False))


def test_hinge_is_averaged_over_all_logits():
    model = Discriminator(TINY).eval()
    loss = GANLoss(preset("projected256").loss)
    real, fake = torch.rand(2, 3, 3, 32, 32).unbind(0)
    torch.manual_seed(1)
    terms = loss.discriminator(model, real, fake)
    torch.manual_seed(1)
    a, b = model(real), model(fake)
    assert terms.keys() == {"adversarial"}
    torch.testing.assert_close(terms["adversarial"], ((1 - a).clamp(min=0) + (1 + b).clamp(min=0)).mean())
    torch.manual_seed(1)
    expected = -model(fake).mean()
    torch.manual_seed(1)
    torch.testing.assert_close(loss.generator(model, None, fake)["adversarial"], expected)


def test_pixel_discriminator_beside():
    plain, model = Discriminator(TINY), Discriminator(replace(TINY, pixel_width=16)).eval()
    assert plain.pixels is None
    convs = [m for m in model.pixels.modules() if isinstance(m, SpectralConv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(3, 16), (16, 32), (32, 64), (64, 1)]
    images = torch.rand(2, 3, 32, 32)
    logits = model(images, augment=False)
    assert logits.shape == (2, plain(images).shape[1] + 25)
    torch.testing.assert_close(logits[:, -25:], model.pixels(images).flatten(1))


GENERATORS = {
    "fastgan": FastGANGeneratorConfig(latent_dim=8, image_size=32, width=8, skip_ratio=8),
    "transgan": GeneratorConfig(latent_dim=8, base_dim=64, depths=(1, 1, 1), heads=2),
    "stylenat": StyleNATGeneratorConfig(
        latent_dim=8, dims=(8, 8, 8, 8), dilations=("1", "1,2", "1,4"), head_dim=4, min_heads=2, mapping_depth=1
    ),
    "vitgan": ViTGeneratorConfig(latent_dim=16, dim=32, depth=1, heads=2, implicit_dim=16, mapping_depth=1),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_trains_against_it(name):
    """Its loss falls when only the generator moves, and every parameter of it takes part."""
    recipe = replace(preset("projected32"), generator=GENERATORS[name], discriminator=replace(TINY, augment=()))
    torch.manual_seed(0)
    generator, discriminator, loss = build(recipe.generator), build(recipe.discriminator), build(recipe.loss)
    z = torch.randn(2, recipe.generator.latent_dim)
    optimizer = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.0, 0.99))
    values = []
    for step in range(4):
        (term,) = loss.generator(discriminator, None, generator(z)).values()
        optimizer.zero_grad()
        term.backward()
        if step == 3:  # what starts at zero has moved by now
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in generator.parameters())
        optimizer.step()
        values.append(float(term.detach()))
    assert values[-1] < values[0]


def test_timm_networks_are_normalised_and_tapped_by_stride(monkeypatch):
    class Network(nn.Module):
        pretrained_cfg: ClassVar = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.5, 0.2)}
        feature_info = types.SimpleNamespace(reduction=lambda: [2, 4, 8, 16, 32], channels=lambda: [1, 3, 3, 3, 3])

        def forward(self, x):
            return [F.avg_pool2d(x, stride) for stride in self.feature_info.reduction()]

    def create_model(name, pretrained, features_only):
        assert (name, pretrained, features_only) == ("some_net", True, True)
        return Network()

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    maps_of = make_maps("timm:some_net")
    assert maps_of.channels == (3, 3, 3, 3)
    unit = torch.rand(2, 3, 64, 64)
    found = maps_of(unit * 2 - 1)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.25, 0.5, 0.2]).view(3, 1, 1)
    for x, stride in zip(found, (4, 8, 16, 32), strict=True):
        torch.testing.assert_close(x, F.avg_pool2d((unit - mean) / std, stride), rtol=1e-4, atol=1e-5)
    Network.feature_info = types.SimpleNamespace(reduction=lambda: [4, 8, 16], channels=lambda: [1, 1, 1])
    with pytest.raises(ValueError, match="timm:some_net has no map of stride 32"):
        make_maps("timm:some_net")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="features timm:some_net needs timm"):
        make_maps("timm:some_net")


def test_a_feature_network_of_ones_own(monkeypatch):
    monkeypatch.setattr(by_name, "MAPS", dict(by_name.MAPS))

    class Own(MapNetwork):
        channels = (3, 3, 3, 3)

        def forward(self, images):
            return [F.avg_pool2d(images, stride) for stride in STRIDES]

    by_name.register("own", Own)
    assert Discriminator(replace(TINY, features="own"))(torch.rand(2, 3, 32, 32)).shape[0] == 2
    with pytest.raises(ValueError, match="'own' are there already"):
        by_name.register("own", Own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 4}, "discriminator.channels is 4"),
        ({"image_size": 4}, "discriminator.image_size is 4"),
        ({"image_size": 150}, "discriminator.image_size is 150"),
        ({"feature_size": 100}, "discriminator.feature_size is 100"),
        ({"feature_size": 96}, "discriminator.feature_size is 96"),
        ({"features": "vgg"}, "features is 'vgg'; it must be one of lite1, random or timm:NAME"),
        ({"pixel_width": -1}, "discriminator.pixel_width is -1"),
        ({"augment": ("colour",)}, "'colour'"),
    ],
)
def test_bad_configurations_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
