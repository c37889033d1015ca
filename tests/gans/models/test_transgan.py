from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import natten_ext
from gans.losses.adversarial import GANLoss, LossConfig
from gans.models.layers import CrossAttention, ScaleFreeRMSNorm, TokenNoise, anti_alias, to_image
from gans.models.transgan import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig
from gans.recipes.presets_transgan import PRESETS
from gans.recipes.registry import build
from gans.training.recompute import recompute_blocks

# Parameters of the published checkpoints: all floating-point entries; buffers (integer indices, the filter bank of an
# augmentation) are not counted, nor 20 scalars of the CelebA-HQ generator's cross attention that its code never uses.
PUBLISHED = {
    "cifar10": (83_312_495, 10_210_400),
    "stl10": (168_466_623, 10_341_536),
    "church256": (205_291_952, 17_754_569),
    "celebahq256": (212_903_275 - 20, 13_334_593),
}


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    recipe = PRESETS[name].recipe
    with torch.device("meta"):
        counts = count(Generator(recipe.generator)), count(Discriminator(recipe.discriminator))
    assert counts == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_of_every_preset(name):
    recipe = PRESETS[name].recipe
    with torch.device("meta"), natten_ext.use_backend("reference"):
        images = build(recipe.generator)(torch.randn(2, recipe.generator.latent_dim))
        scores = build(recipe.discriminator)(images, augment=False)
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


def calls_of(model: torch.nn.Module, run) -> list[tuple]:
    """(map or tokens, heads, head_dim, window, table?) of every attention in the order of `run()`."""
    calls = []

    def note(module, args, output):
        x = args[0]
        heads, width = (module.num_heads, module.embed_dim) if hasattr(module, "num_heads") else (module.heads, None)
        if width is None:
            calls.append((x.shape[1] * x.shape[2], args[1].shape[1], heads, x.shape[-1] // heads))
        else:
            window = module.window_size[0] if hasattr(module, "window_size") else None
            calls.append((x.shape[1], heads, width // heads, window, module.rel_pos_bias is not None))

    for module in model.modules():
        if isinstance(module, natten_ext.Attention | natten_ext.GridAttention | CrossAttention):
            module.register_forward_hook(note)
    run()
    return calls


def test_attention_shapes_at_256_px_are_the_published_ones():
    """Section 4 of our fact sheet: window, head width and tables of each block of the four networks."""
    seen = {}
    for name in ("church256", "celebahq256"):
        recipe = PRESETS[name].recipe
        with torch.device("meta"), natten_ext.use_backend("reference"):
            generator, discriminator = Generator(recipe.generator), Discriminator(recipe.discriminator)
            z, images = torch.randn(1, 512), torch.randn(1, 3, 256, 256)
            seen[name] = (
                calls_of(generator, lambda g=generator, z=z: g(z)),
                calls_of(discriminator, lambda d=discriminator, x=images: d(x, augment=False)),
            )
    first = [(8, 4, 256, 8, True)] * 5
    rest = (
        [(16, 4, 256, 16, True)] * 4
        + [(32, 4, 256, 32, True)] * 4
        + [(64, 4, 64, 16, True)] * 4
        + [(128, 4, 16, 16, True)] * 4
        + [(256, 4, 4, 16, True)] * 4
    )
    assert seen["church256"][0] == first + rest
    cross = [(call[0] ** 2, 64, 4, call[2]) for call in rest]
    assert seen["celebahq256"][0] == [call for pair in zip(cross, rest, strict=True) for call in pair]
    assert seen["church256"][1] == (
        [(64, 4, 72, 16, True)] * 2
        + [(64, 4, 72, 64, True)]
        + [(32, 4, 84, 32, True)] * 3
        + [(16, 4, 96, 16, True)] * 4
        + [(257, 4, 96, None, False)]
    )
    assert seen["celebahq256"][1] == (
        [(128, 4, 24, 4, False)] * 3
        + [(64, 4, 48, 4, False)] * 2
        + [(64, 4, 48, 64, False)]
        + [(32, 4, 96, 32, False)] * 4
        + [(1025, 4, 96, None, False)]
    )


# The 256-pixel recipes with every side divided by 8 and fewer channels: nothing else about them is changed.
SMALL = {
    "church256": (
        replace(
            PRESETS["church256"].recipe.generator,
            latent_dim=6,
            base_size=1,
            base_dim=64,
            heads=1,
            depths=(1, 1, 1, 1, 1, 1),
            windows=(1, 2, 4, 2, 2, 2),
        ),
        replace(
            PRESETS["church256"].recipe.discriminator,
            image_size=32,
            patch_dims=(8, 4, 4),
            depths=(2, 1, 1),
            windows=(2, 4, 2),
            augment=(),
        ),
    ),
    "celebahq256": (
        replace(
            PRESETS["celebahq256"].recipe.generator,
            latent_dim=6,
            base_size=1,
            base_dim=64,
            heads=1,
            depths=(0, 1, 1, 1, 1, 1),
            windows=(1, 2, 4, 2, 2, 2),
        ),
        replace(
            PRESETS["celebahq256"].recipe.discriminator,
            image_size=32,
            patch_dims=(4, 4, 8),
            depths=(1, 2, 1),
            windows=(4, 4, 4),
            augment=("filter", "hue"),
        ),
    ),
}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """In float64 and with no parameter at a special value."""
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("recompute", [False, True])
def test_small_256_px_networks_train_through_the_fused_kernels(name, recompute):
    """All parameter gradients of both networks, penalty included, against naive attention; also when recomputed."""
    torch.manual_seed(0)
    generator, discriminator = (randomised(k(c)) for k, c in zip((Generator, Discriminator), SMALL[name], strict=True))
    loss = GANLoss(LossConfig())
    z, real = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def gradients(backend: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        for model in (generator, discriminator):
            model.zero_grad(set_to_none=True)
        with natten_ext.use_backend(backend):
            fake = generator(z)
            assert fake.shape == real.shape
            terms = loss.discriminator_penalty(discriminator, real, fake.detach(), step=0)
            terms |= loss.discriminator(discriminator, real, fake.detach())
            sum(terms.values()).backward()
            loss.generator(discriminator, None, fake)["adversarial"].backward()
        named = [*generator.named_parameters(prefix="G"), *discriminator.named_parameters(prefix="D")]
        return {name: parameter.grad for name, parameter in named}

    expected = {name: gradient.clone() for name, gradient in gradients("reference").items()}
    if recompute:
        assert recompute_blocks(generator) + recompute_blocks(discriminator) > 8
    # A window of one pixel has one key: its queries, keys and table change nothing.
    for name_, gradient in gradients("auto").items():
        torch.testing.assert_close(gradient, expected[name_], rtol=1e-8, atol=1e-9, msg=lambda m, n=name_: f"{n}: {m}")


def test_anti_alias_filter_is_bicubic_enlargement_and_averaging():
    torch.manual_seed(0)
    for height, width in ((8, 8), (5, 3), (1, 2)):
        x = torch.randn(2, height, width, 3, dtype=torch.float64)
        large = F.interpolate(to_image(x), scale_factor=4, mode="bicubic")
        expected = F.avg_pool2d(large, 4).permute(0, 2, 3, 1)
        torch.testing.assert_close(anti_alias(x), expected)


def test_cross_attention_by_formula():
    torch.manual_seed(0)
    module = CrossAttention(8, 2, 6).double()
    x, context = torch.randn(2, 3, 4, 8).double(), torch.randn(2, 5, 6).double()
    outputs = []
    for head in range(2):
        rows = slice(head * 4, head * 4 + 4)
        query = x.flatten(1, 2) @ module.query.weight[rows].t()
        key, value = (context @ linear.weight[rows].t() for linear in (module.key, module.value))
        outputs.append((query @ key.transpose(1, 2) / 2).softmax(-1) @ value)
    expected = module.proj(torch.cat(outputs, -1)).view_as(x)
    torch.testing.assert_close(module(x, context), expected)
    assert [name for name, _ in module.named_parameters() if "bias" in name] == ["proj.bias"]


def test_generator_doubles_as_configured(tiny):
    """With empty stages a generator is its doublings: two bicubic ones, then a filter and a pixel shuffle."""
    config = replace(
        tiny.generator, base_size=4, base_dim=8, heads=1, depths=(0,) * 4, windows=(4,) * 4, bicubic=2, anti_alias=1
    )
    assert config.dims == (8, 8, 8, 2) and config.sizes == (4, 8, 16, 32)
    generator = Generator(config).double()
    for embedding in generator.pos_embed:
        torch.nn.init.zeros_(embedding)
    z = torch.randn(2, 6, dtype=torch.float64)
    x = to_image(generator.input(z).view(2, 4, 4, 8))
    x = F.interpolate(F.interpolate(x, scale_factor=2, mode="bicubic"), scale_factor=2, mode="bicubic")
    x = F.pixel_shuffle(F.avg_pool2d(F.interpolate(x, scale_factor=4, mode="bicubic"), 4), 2)
    torch.testing.assert_close(generator(z), generator.to_rgb(x))
    with_norm = Generator(replace(config, latent_norm=True)).double()
    with_norm.load_state_dict(generator.state_dict())
    torch.testing.assert_close(with_norm(3 * z), with_norm(z))


def test_first_patches_overlap():
    torch.manual_seed(0)
    config = SMALL["celebahq256"][1]
    discriminator = Discriminator(config)
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert [patches.kernel_size[0] for patches in discriminator.patches] == [4, 4, 8]
    discriminator.patches[0](images)[0, :, 5, 5].sum().backward()
    reached = images.grad[0].abs().sum(0) > 0
    assert reached[9:13, 9:13].all() and int(reached.sum()) == 16


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
            recipe = PRESETS[name].recipe
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
        (GeneratorConfig, {"bicubic": 3}, "generator.bicubic is 3"),
        (GeneratorConfig, {"anti_alias": -1}, "generator.anti_alias is -1"),
        (DiscriminatorConfig, {"full_blocks": (1,)}, "discriminator.full_blocks"),
        (DiscriminatorConfig, {"full_blocks": (0, 4)}, "discriminator.full_blocks"),
        (DiscriminatorConfig, {"overlap": True, "patch_size": 1}, "discriminator.patch_size is 1"),
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
