from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import natten_ext
from gans.common import rng
from gans.losses.adversarial import GANLoss, LossConfig
from gans.models.augment import diff_augment
from gans.models.equalized import SpectralLinear
from gans.models.vitgan import Discriminator, Generator, ViTDiscriminatorConfig, ViTGeneratorConfig
from gans.models.vitgan_layers import ConvHead, ImplicitHead, ModulatedConv, SelfModulatedNorm, ViTAttention
from gans.recipes.presets_vitgan import PRESETS
from gans.recipes.registry import build
from gans.training.recompute import recompute_blocks

GENERATOR = ViTGeneratorConfig(
    image_size=12, channels=1, patch_size=4, dim=12, depth=2, heads=3, latent_dim=5, implicit_dim=7, mapping_depth=2
)
DISCRIMINATOR = ViTDiscriminatorConfig(image_size=12, channels=1, patch_size=4, dim=12, depth=2, heads=3)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "vitgan-digits"])
@pytest.mark.parametrize("head", ["implicit", "conv"])
def test_shapes_of_every_preset(name, head):
    recipe = PRESETS[name].recipe
    size = recipe.generator.image_size
    with torch.device("meta"), natten_ext.use_backend("reference"):
        generator = Generator(replace(recipe.generator, head=head))
        discriminator = Discriminator(recipe.discriminator)
        images = generator(torch.randn(2, recipe.generator.latent_dim))
        assert images.shape == (2, 3, size, size)
        assert discriminator(images, augment=False).shape == (2,)


def test_digits_are_small_grey_images():
    recipe = PRESETS["vitgan-digits"].recipe
    with torch.no_grad(), natten_ext.use_backend("reference"):
        images = Generator(recipe.generator)(torch.randn(4, 96))
        scores = build(recipe.discriminator)(images)
    assert images.shape == (4, 1, 16, 16)
    assert scores.shape == (4,)


def test_attention_shapes_are_the_papers():
    """(heads, tokens, head_dim): 64 tokens in G, 64 and a class token in D, at 32 and at 64 px."""
    seen = []

    class Seen(ViTAttention):
        def forward(self, x):
            seen.append((self.heads, x.shape[1], x.shape[2] // self.heads))
            return x

    for name in ("vitgan32", "vitgan64"):
        recipe = PRESETS[name].recipe
        with torch.device("meta"):
            networks = Generator(recipe.generator), Discriminator(recipe.discriminator)
            for network in networks:
                for block in network.blocks:
                    block.attn.__class__ = Seen
            networks[1](networks[0](torch.randn(1, 384)), augment=False)
    assert seen == ([(6, 64, 64)] * 4 + [(6, 65, 64)] * 4) + ([(6, 64, 64)] * 6 + [(6, 65, 64)] * 6)


def naive_attention(module: ViTAttention, x: torch.Tensor) -> torch.Tensor:
    """Kim et al.'s and ViTGAN's formulas written out head by head."""
    outputs = []
    w_query, w_value = (linear.effective_weight() for linear in (module.query, module.value))
    w_key = w_query if module.key is None else module.key.effective_weight()
    for head in range(module.heads):
        rows = slice(head * 4, head * 4 + 4)
        query, key, value = x @ w_query[rows].t(), x @ w_key[rows].t(), x @ w_value[rows].t()
        if module.score == "l2":
            score = -(query[:, :, None] - key[:, None]).square().sum(-1) / 2
        else:
            score = query @ key.transpose(1, 2) / 2
        if module.values == "projected":
            value = x @ (w_query[rows].t() @ w_query[rows]) @ w_value[rows].t() / 2
        outputs.append(score.softmax(-1) @ value)
    return module.proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("score", ["l2", "dot"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("values", ["plain", "projected"])
def test_attention_by_formula(score, tied, values):
    torch.manual_seed(0)
    module = ViTAttention(12, 3, score=score, tied=tied, values=values).double()
    assert (module.key is None) == tied
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), naive_attention(module, x))


def test_self_modulated_norm_by_formula():
    torch.manual_seed(0)
    norm = SelfModulatedNorm(6, 4, eps=1e-5).double()
    x, w = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x, w), norm.gamma(w)[:, None] * normed + norm.beta(w)[:, None])
    torch.testing.assert_close(norm(x, 0 * w), normed)  # gamma starts around 1 and beta around 0


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_convolution_is_one_with_weights_per_example(demodulate):
    torch.manual_seed(0)
    conv = ModulatedConv(4, 3, 5, kernel=3, demodulate=demodulate).double()
    torch.nn.init.normal_(conv.bias)
    x, style = torch.randn(2, 4, 6, 6, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    for i in range(2):
        weight = conv.weight * conv.scale * conv.style(style[i])[:, None, None]
        if demodulate:
            weight = weight * (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        expected = F.conv2d(x[i : i + 1], weight, conv.bias, padding=1)
        torch.testing.assert_close(conv(x, style)[i : i + 1], expected)


@pytest.mark.parametrize("head", ["implicit", "conv"])
def test_heads_put_each_token_in_its_place(head):
    """The token of row 0, column 2 of 3 x 3 reaches its own 4 x 4 pixels, or pixels around them."""
    torch.manual_seed(0)
    module = ImplicitHead(6, 5, 4, 2) if head == "implicit" else ConvHead(6, 5, 3, 12, 2)
    module = module.double()
    x = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(1, 5, dtype=torch.float64)
    image = module(x, w)
    assert image.shape == (1, 2, 12, 12)
    changed = x.detach().clone()
    changed[0, 2] += 1
    difference = (module(changed, w) - image).abs().sum(1)[0]
    if head == "implicit":
        inside = torch.zeros(12, 12, dtype=torch.bool)
        inside[:4, 8:] = True
        assert difference[inside].min() > 0 and difference[~inside].max() == 0
    index = torch.arange(12.0, dtype=torch.float64)
    row, column = ((difference.sum(axis) * index).sum() / difference.sum() for axis in (1, 0))
    assert row < 4.5 and column > 6.5


def test_z_comes_in_through_modulation_only():
    torch.manual_seed(0)
    generator = Generator(GENERATOR)
    images = generator(torch.randn(3, 5))
    assert not torch.allclose(images[0], images[1])
    for module in generator.modules():
        if isinstance(module, SelfModulatedNorm):
            torch.nn.init.zeros_(module.gamma.weight)
            torch.nn.init.zeros_(module.beta.weight)
    images = generator(torch.randn(3, 5))
    torch.testing.assert_close(images[0], images[1])


def test_residual_and_generator_options():
    torch.manual_seed(0)
    with_input = Generator(GENERATOR)
    with_normed = Generator(replace(GENERATOR, residual="normed"))
    with_normed.load_state_dict(with_input.state_dict())
    z = torch.randn(2, 5)
    assert not torch.allclose(with_input(z), with_normed(z))
    authors = Generator(replace(GENERATOR, score="l2", spectral="improved", head="conv", norm_eps=1e-3))
    assert any(isinstance(m, SpectralLinear) for m in authors.modules())
    assert all(block.attn.key is None for block in authors.blocks)
    assert authors(z).shape == (2, 1, 12, 12)


def test_every_linear_map_of_the_discriminator_is_normed_and_equalised():
    discriminator = Discriminator(DISCRIMINATOR)
    linears = [m for m in discriminator.modules() if isinstance(m, SpectralLinear)]
    assert len(linears) == 2 + 2 * 5  # patches and head; query, value, proj, fc1, fc2 of each block
    assert all(linear.scale != 1 for linear in linears)
    others = {type(m) for m in discriminator.modules() if hasattr(m, "weight")} - {SpectralLinear}
    assert others == {torch.nn.LayerNorm}


def test_patches_overlap_by_half_a_patch():
    torch.manual_seed(0)
    discriminator = Discriminator(replace(DISCRIMINATOR, augment=()))
    assert discriminator.kernel == 8
    assert Discriminator(replace(DISCRIMINATOR, overlap=0)).kernel == 4
    seen = []
    discriminator.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(1, 1, 12, 12, requires_grad=True)
    discriminator(images)
    assert seen[0].shape == (1, 10, 12)
    seen[0][0, 1 + 4].sum().backward()  # the middle one of 3 x 3 patches, after the class token
    reached = images.grad[0, 0] != 0
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[2:10, 2:10] = True
    assert torch.equal(reached, expected)


def test_augmentation_can_be_left_out():
    discriminator = Discriminator(DISCRIMINATOR).eval()
    images = torch.rand(4, 1, 12, 12)
    assert torch.equal(discriminator(images, augment=False), discriminator(images, augment=False))
    torch.manual_seed(3)
    expected = discriminator(diff_augment(images, DISCRIMINATOR.augment, 0.8), augment=False)
    torch.manual_seed(3)
    assert torch.equal(discriminator(images), expected)
    assert not torch.equal(expected, discriminator(images, augment=False))


LOSSES = {
    "its own": LossConfig(adversarial="nonsaturating", gp_weight=0, drift=0, bcr_real=10, bcr_fake=10),
    "relativistic with R1 and R2": LossConfig(adversarial="relativistic", gp_weight=0, drift=0, r1=1, r2=1),
    "wgan-gp": LossConfig(),
}


def loss_gradients(discriminator, loss, images, backend):
    discriminator.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with natten_ext.use_backend(backend):
        terms = loss.discriminator(discriminator, *images)
        terms |= loss.discriminator_penalty(discriminator, *images, step=0)
        torch.stack(list(terms.values())).sum().backward()
    return {name: p.grad.clone() for name, p in discriminator.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("values", ["plain", "projected"])
@pytest.mark.parametrize("loss", LOSSES)
def test_parameter_gradients_through_the_fused_double_backward(loss, values):
    """Every parameter gradient of the whole loss: the default backend against naive attention, in float64."""
    torch.manual_seed(0)
    discriminator = Discriminator(replace(DISCRIMINATOR, values=values)).double()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    images = torch.randn(2, 4, 1, 12, 12, dtype=torch.float64)
    function = GANLoss(LOSSES[loss])
    expected = loss_gradients(discriminator, function, images, "reference")
    assert len(expected) == len(list(discriminator.parameters()))
    for name, gradient in loss_gradients(discriminator, function, images, "auto").items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_parts_of_a_batch_add_up_to_the_whole():
    """Accumulated over two parts, the gradients are the whole batch's: augmentation and bCR belong to images."""
    torch.manual_seed(0)
    discriminator = Discriminator(DISCRIMINATOR).double()
    images = torch.randn(2, 4, 1, 12, 12, dtype=torch.float64)
    loss = GANLoss(replace(LOSSES["its own"], r1=1.0))

    def gradients(*parts):
        discriminator.zero_grad(set_to_none=True)
        for start, stop in parts:
            with rng.part(7, 4, start, stop):
                terms = loss.discriminator(discriminator, *images[:, start:stop])
            with rng.part(8, 4, start, stop):
                terms |= loss.discriminator_penalty(discriminator, *images[:, start:stop], step=0)
            (torch.stack(list(terms.values())).sum() / len(parts)).backward()
        return [p.grad.clone() for p in discriminator.parameters()]

    for whole, parts in zip(gradients((0, 4)), gradients((0, 2), (2, 4)), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


def test_gradient_checkpointing_changes_nothing_to_the_second_derivative():
    torch.manual_seed(0)
    discriminator = Discriminator(DISCRIMINATOR).double()
    images = torch.randn(2, 4, 1, 12, 12, dtype=torch.float64)
    loss = GANLoss(LOSSES["relativistic with R1 and R2"])
    expected = loss_gradients(discriminator, loss, images, "auto")
    generator = Generator(GENERATOR)
    z = torch.randn(2, 5)
    image = generator(z).detach()
    assert recompute_blocks(discriminator) == 2 and recompute_blocks(generator) == 2
    actual = loss_gradients(discriminator, loss, images, "auto")
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-12, atol=1e-14)
    assert torch.equal(generator(z), image)


def test_saved_and_restored_the_discriminator_continues_identically():
    """Power iteration vectors and initial sigmas are in the state dict: training goes on bit for bit."""
    images = torch.randn(6, 2, 4, 1, 12, 12)
    loss = GANLoss(LOSSES["its own"])

    def make(seed):
        torch.manual_seed(seed)
        model = Discriminator(DISCRIMINATOR)
        return model, torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.0, 0.99))

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            for module in model.modules():
                if hasattr(module, "begin_step"):
                    module.begin_step()
            optimizer.zero_grad()
            torch.stack(list(loss.discriminator(model, *images[step]).values())).sum().backward()
            optimizer.step()

    model, optimizer = make(0)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, range(3, 6))
    other, other_optimizer = make(1)
    state = torch.load(io.BytesIO(file.getvalue()))
    other.load_state_dict(state[0])
    other_optimizer.load_state_dict(state[1])
    train(other, other_optimizer, range(3, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_attention_sees_other_tokens_at_initialisation():
    """With queries of unit variance each token attends to itself alone, and the score ignores the image."""
    images = torch.randn(8, 3, 32, 32)
    spread = {}
    for gain in (None, 1.0):
        torch.manual_seed(0)
        discriminator = Discriminator(ViTDiscriminatorConfig(depth=2, query_gain=gain))
        spread[gain] = float(discriminator(images, augment=False).detach().std())
    assert spread[None] > 0.05 and spread[1.0] < 0.01


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ViTGeneratorConfig, {"channels": 2}, "generator.channels is 2"),
        (ViTGeneratorConfig, {"patch_size": 5}, "generator.patch_size is 5"),
        (ViTGeneratorConfig, {"heads": 7}, "generator.heads is 7"),
        (ViTGeneratorConfig, {"depth": 0}, "depth"),
        (ViTGeneratorConfig, {"head": "linear"}, "generator.head is 'linear'"),
        (ViTGeneratorConfig, {"residual": "none"}, "generator.residual is 'none'"),
        (ViTGeneratorConfig, {"head": "conv", "image_size": 36, "patch_size": 6}, "power of 2"),
        (ViTGeneratorConfig, {"implicit_dim": 0}, "implicit_dim is 0"),
        (ViTDiscriminatorConfig, {"overlap": -1}, "discriminator.overlap is -1"),
        (ViTDiscriminatorConfig, {"augment_probability": 0}, "augment_probability is 0"),
        (ViTDiscriminatorConfig, {"augment": ("colour",)}, "'colour'"),
        (ViTDiscriminatorConfig, {"query_gain": 0}, "query_gain is 0"),
    ],
)
def test_bad_configurations_name_the_field(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**change)
