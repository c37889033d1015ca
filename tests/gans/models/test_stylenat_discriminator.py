"""StyleNAT's discriminator: counts, wavelets, minibatch deviation and spectral layers by their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gans.losses.adversarial import GANLoss
from gans.models.spectral_norm import SpectralConv2d, SpectralConvTranspose2d, SpectralDense, begin_step
from gans.models.stylenat_discriminator import (
    Discriminator,
    StyleNATDiscriminatorConfig,
    haar,
    haar_filters,
    minibatch_deviation,
)
from gans.models.stylenat_layers import ImageNetNormalization, fir_blur
from gans.recipes.named import preset

TINY = StyleNATDiscriminatorConfig(image_size=32, width=512, max_dim=24)


@pytest.mark.parametrize(("name", "count"), [("stylenat-ffhq256", 26_211_585), ("stylenat-ffhq1024", 27_736_641)])
def test_parameter_counts_are_the_published_ones(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Discriminator(preset(name).discriminator).parameters()) == count


def test_published_widths():
    assert StyleNATDiscriminatorConfig().dims == (128, 512, 512, 512, 512, 512)
    assert StyleNATDiscriminatorConfig(image_size=1024).dims == (32, 128, 256, 512, 512, 512, 512, 512)
    assert TINY.dims == (16, 24, 24)


def test_wavelets_of_one_block():
    """Bands in order: sum, top minus bottom, left minus right, and the diagonal; orthonormal."""
    block = torch.tensor([[1.0, 2.0], [5.0, 11.0]]).view(1, 1, 2, 2)
    torch.testing.assert_close(haar(block).flatten(), torch.tensor([19.0, -13.0, -7.0, 5.0]) / 2)
    filters = haar_filters(block).flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(4))


def test_wavelets_are_band_by_band_and_can_be_undone():
    x = torch.randn(2, 3, 6, 8).double()
    bands = haar(x)
    assert bands.shape == (2, 12, 3, 4)
    torch.testing.assert_close(bands[:, :3], F.avg_pool2d(x, 2) * 2)
    kernel = haar_filters(x).repeat_interleave(3, dim=0)[:, None]
    back = F.conv_transpose2d(bands, kernel, stride=2, groups=12).unflatten(1, (4, 3)).sum(1)
    torch.testing.assert_close(back, x)


def test_minibatch_deviation_by_definition():
    x = torch.randn(6, 5, 2, 3).double()
    result = minibatch_deviation(x, 4)  # 4 does not divide 6: groups of 3
    torch.testing.assert_close(result[:, :5], x)
    for group in (slice(0, 3), slice(3, 6)):
        expected = ((x[group] - x[group].mean(0)).square().mean(0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(result[group, 5], expected.expand(3, 2, 3))
    assert minibatch_deviation(x[:1], 4)[0, 5].max() < 1e-3


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (lambda: SpectralDense(7, 5), 0),
        (lambda: SpectralConv2d(3, 6, 3, padding=1), 0),
        (lambda: SpectralConvTranspose2d(4, 6, 4), 1),
    ],
)
def test_spectral_layers_have_norm_1_and_move_between_updates_only(layer, axis):
    torch.manual_seed(2)
    layer = layer().double()
    with torch.no_grad():
        layer.weight.mul_(5)
    for _ in range(200):
        layer.begin_step()
    matrix = layer.normalized_weight().transpose(0, axis).flatten(1)
    torch.testing.assert_close(torch.linalg.matrix_norm(matrix, 2), torch.ones(()).double(), rtol=1e-6, atol=0)
    shape = (2, 7) if isinstance(layer, SpectralDense) else (2, layer.in_channels, 5, 5)
    x = torch.randn(shape).double()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.train()(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    plain = type(layer).__mro__[2].forward  # the layer of torch, with the normalised weight
    weight, layer.weight = layer.weight, torch.nn.Parameter(layer.normalized_weight().detach())
    expected = plain(layer, x)
    layer.weight = weight
    torch.testing.assert_close(layer(x), expected)


def test_begin_step_moves_every_layer():
    model = Discriminator(TINY)
    vectors = [name for name in model.state_dict() if name.endswith("right_vector")]
    assert len(vectors) == 2 * 3 + 4  # of two scales and the end
    before = {name: model.state_dict()[name].clone() for name in vectors}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    begin_step(model)
    assert not any(torch.equal(model.state_dict()[name], before[name]) for name in vectors)


def test_pyramid_is_blurred_and_halved_images():
    """Each scale sees the wavelets of a blurred image of half the size, as by undoing and redoing the transform."""
    model = Discriminator(TINY).double().eval()
    seen = []
    for scale in [*model.scales, model]:
        scale.from_rgb.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randn(4, 3, 32, 32).double()
    model(images)
    image = ImageNetNormalization().double()(images)
    for size, bands in zip((16, 8, 4), seen, strict=True):
        assert bands.shape == (4, 12, size, size)
        torch.testing.assert_close(bands, haar(image))
        image = F.pad(image, (1, 1, 1, 1))
        image = fir_blur(image, padding=0, stride=2)


def test_scores_are_clean_unless_asked():
    model = Discriminator(TINY).eval()
    images = torch.randn(4, 3, 32, 32)
    scores = model(images)
    assert scores.shape == (4,)
    assert torch.equal(model(images), scores)
    assert not torch.equal(model(images, augment=True), scores)


def test_balanced_consistency_compares_clean_and_augmented():
    config = replace(preset("stylenat-ffhq256").loss, bcr_real=10, bcr_fake=0)
    model = Discriminator(TINY).eval()
    real, fake = torch.randn(2, 4, 3, 32, 32).unbind(0)
    torch.manual_seed(4)
    term = GANLoss(config).discriminator(model, real, fake)["bcr"]
    torch.manual_seed(4)
    expected = 10 * (model(real) - model(real, augment=True)).square().mean()
    assert expected > 0
    torch.testing.assert_close(term, expected)


def test_r1_is_that_of_the_normalised_images():
    """The recipe's gamma makes R1 of images in [-1, 1] what the published one is of normalised images."""
    recipe = preset("stylenat-ffhq256")
    model = Discriminator(TINY).double().eval()
    real = torch.randn(4, 3, 32, 32).double()
    terms = GANLoss(recipe.loss).discriminator_penalty(model, real, real, step=16)
    inner = Discriminator(replace(TINY, normalization="none")).double().eval()
    inner.load_state_dict(model.state_dict())
    images = ImageNetNormalization().double()(real).requires_grad_()
    (gradient,) = torch.autograd.grad(inner(images).sum(), images)
    published = 16 * 10 / 2 * gradient.square().flatten(1).sum(1).mean()
    torch.testing.assert_close(terms["r1"], published, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 24}, "discriminator.image_size is 24"),
        ({"image_size": 8}, "discriminator.image_size is 8"),
        ({"channels": 1}, "discriminator.normalization is 'imagenet'"),
        ({"group": 0}, "discriminator.group is 0"),
        ({"width": 8}, "discriminator.width is 8"),
        ({"augment": ("mirror",)}, "'mirror'"),
    ],
)
def test_bad_configurations_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
