"""StyleNAT's generator: counts, layers by their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gans.losses.path_length import PathLengthLossConfig
from gans.models.stylenat import Generator, dilation_of_heads
from gans.models.stylenat_layers import AdaptiveInstanceNorm, ImageNetNormalization, LevelUp, fir_blur, fir_upsample
from gans.recipes.named import preset
from gans.recipes.registry import build
from natten_ext import compat, use_backend
from tests.gans.style_generators import CONFIGS, generator_of

TINY = CONFIGS["stylenat"]


def tiny(**changes) -> Generator:
    return generator_of(replace(TINY, **changes))


@pytest.mark.parametrize(("name", "count"), [("stylenat-ffhq256", 48_921_000), ("stylenat-ffhq1024", 49_452_934)])
def test_parameter_counts_are_the_published_ones(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Generator(preset(name).generator).parameters()) == count


def test_published_heads_and_dilations():
    config = preset("stylenat-ffhq1024").generator
    assert config.sizes == (4, 8, 16, 32, 64, 128, 256, 512, 1024)
    assert [config.heads_of(dim) for dim in config.dims] == [16, 16, 16, 16, 16, 8, 4, 4, 4]
    assert config.blocks == 18
    assert [partition[-1] for partition in config.partitions] == [max(size // 8, 1) for size in config.sizes[1:]]
    assert preset("stylenat-ffhq256").generator.blocks == 14
    church = preset("stylenat-church256").generator
    assert [len(partition) for partition in church.partitions] == [1, 2, 3, 4, 6, 8]
    assert [church.heads_of(dim) for dim in church.dims[-2:]] == [8, 8]


def test_heads_that_cannot_be_divided_go_to_the_last_partitions():
    assert dilation_of_heads((1, 8), 4) == [1, 1, 8, 8]
    assert dilation_of_heads((1, 2, 4), 16) == [1] * 5 + [2] * 5 + [4] * 6
    assert dilation_of_heads((1, 2, 4, 8, 12, 16), 8) == [1, 2, 4, 8, 12, 12, 16, 16]
    assert dilation_of_heads((3,), 5) == [3] * 5


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.natten_ext_cpu.forward.default
        return func(*args, **(kwargs or {}))


def test_one_launch_per_block():
    generator = tiny()
    with Launches() as launches, torch.no_grad():
        generator(torch.randn(1, 6).double())
    assert launches.count == generator.config.blocks == 6


@pytest.mark.parametrize("level", [1, 2])
def test_hydra_attention_is_that_of_its_partitions_one_by_one(level):
    """As the published code has it: heads split, one unfused call per partition with a table of its own, joined."""
    generator = tiny()
    attn = generator.levels[level].blocks[0].attn
    size, dim = generator.config.sizes[level], generator.config.dims[level]
    heads = generator.config.heads_of(dim)
    x = torch.randn(2, size, size, dim).double()
    qkv = attn.qkv(x).reshape(2, size, size, 3, heads, dim // heads).permute(3, 0, 4, 1, 2, 5)
    outputs, first = [], 0
    shares = {1: [(1, 1), (1, 2), (2, 1), (2, 2)], 2: [(1, 1), (2, 4)]}[level]
    for count, dilation in shares:
        q, k, v = qkv[:, :, first : first + count]
        table = attn.rel_pos_bias[first : first + count]
        scores = compat.na2d_qk(q * (dim // heads) ** -0.5, k, 3, dilation, rpb=table)
        outputs.append(compat.na2d_av(scores.softmax(-1), v, 3, dilation))
        first += count
    joined = torch.cat(outputs, 1).permute(0, 2, 3, 1, 4).reshape(x.shape)
    torch.testing.assert_close(attn(x), attn.proj(joined))


def test_first_level_attends_to_all_16_positions():
    generator = tiny()
    attn = generator.levels[0].blocks[0].attn
    weights = attn.attention_weights(torch.randn(1, 4, 4, 16).double(), [(0, 0), (2, 3)])
    assert (weights > 0).all()


def test_adaptive_instance_norm_by_definition():
    norm = AdaptiveInstanceNorm(8, 5).double()
    assert not norm.style.bias.any()
    torch.nn.init.normal_(norm.style.bias)
    x, w = torch.randn(3, 4, 6, 8).double() * 3 + 1, torch.randn(3, 5).double()
    gamma, beta = (w @ norm.style.weight.T / 5**0.5 + norm.style.bias).chunk(2, 1)
    plain = F.instance_norm(x.permute(0, 3, 1, 2).flatten(2), eps=1e-5)
    expected = (gamma[..., None] * plain + beta[..., None]).unflatten(2, (4, 6)).permute(0, 2, 3, 1)
    torch.testing.assert_close(norm(x, w), expected)


def test_fir_filters_by_definition():
    x = torch.randn(2, 3, 5, 4).double()
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]).double() / 8
    up = torch.zeros(2, 3, 10, 8).double()
    up[:, :, ::2, ::2] = x
    padded = F.pad(up, (2, 1, 2, 1))
    expected = torch.zeros_like(up)
    blurred = torch.zeros(2, 3, 6, 5).double()
    wide = F.pad(x, (2, 2, 2, 2))
    for i in range(4):
        for j in range(4):
            expected += 4 * taps[i] * taps[j] * padded[:, :, i : i + 10, j : j + 8]
            blurred += taps[i] * taps[j] * wide[:, :, i : i + 6, j : j + 5]
    torch.testing.assert_close(fir_upsample(x), expected)
    torch.testing.assert_close(fir_blur(x, padding=2), blurred)
    torch.testing.assert_close(fir_blur(x, padding=2, stride=2), blurred[:, :, ::2, ::2])
    torch.testing.assert_close(fir_upsample(torch.ones(1, 1, 6, 6))[..., 2:-2, 2:-2], torch.ones(1, 1, 8, 8))


def test_level_up_adds_scaled_positions_columns_first():
    layer = LevelUp(8, 12, 6).double()
    x = torch.randn(2, 3, 3, 8).double()
    plain = layer(x)  # alpha starts at 0
    with torch.no_grad():
        layer.alpha.fill_(0.5)
    added = layer(x) - plain
    torch.testing.assert_close(added[0], added[1])
    frequencies = [1.0, 10_000**-0.5, 1e-4]  # of half of 12 channels: 3 sines and 3 cosines
    for row, column in ((0, 0), (5, 2)):
        for half, position in ((0, column + 1), (6, row + 1)):
            angles = torch.tensor([position * f for f in frequencies]).double()
            expected = 0.5 * torch.cat([angles.sin(), angles.cos()])
            torch.testing.assert_close(added[0, row, column, half : half + 6], expected, rtol=1e-5, atol=1e-6)
    enlarged = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear").permute(0, 2, 3, 1)
    torch.testing.assert_close(plain, F.layer_norm(enlarged, (8,)) @ layer.reduction.weight.T)


def test_images_add_up_over_the_levels():
    """to_rgb of every level but the last looks at the enlarged map; the last adds at its own size."""
    generator = tiny(normalization="none")
    sizes = []
    for level in generator.levels:
        level.to_rgb.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    generator(torch.zeros(1, 6).double())
    assert sizes == [8, 16, 16]


def test_normalisation_is_undone():
    """With the weights of "imagenet", "none" gives what the network computes: images with ImageNet's deviation."""
    z = torch.randn(2, 6).double()
    generator = tiny()
    raw = tiny(normalization="none")
    raw.load_state_dict(generator.state_dict())
    images, inner = generator(z), raw(z)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    unit = inner * std[:, None, None] + mean[:, None, None]  # in [0, 1] as published
    torch.testing.assert_close(images, 2 * unit - 1, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ImageNetNormalization()(images.float()), inner.float(), rtol=1e-4, atol=1e-5)


def test_digits_are_small_grey_images():
    recipe = preset("stylenat-digits")
    with torch.no_grad(), use_backend("reference"):
        images = build(recipe.generator)(torch.randn(4, 64))
        scores = build(recipe.discriminator)(images)
    assert images.shape == (4, 1, 16, 16)
    assert scores.shape == (4,)


def test_losses_that_do_not_fit_are_refused():
    recipe = preset("stylenat-64")
    with pytest.raises(ValueError, match=r"loss.bcr_against is 'clean'.*make it 'augmented'"):
        replace(recipe, loss=replace(recipe.loss, bcr_real=1.0))
    transgan = preset("cifar10")
    with pytest.raises(ValueError, match="path_length needs a generator with a mapping network"):
        replace(transgan, loss=PathLengthLossConfig())
    assert replace(recipe, loss=PathLengthLossConfig()).loss.path_length == 2


def test_initialisation():
    generator = Generator(preset("stylenat-64").generator).requires_grad_(False)
    block = generator.levels[2].blocks[0]
    assert abs(float(block.attn.qkv.weight.std()) - 0.02) < 1e-3
    assert abs(float(block.attn.rel_pos_bias.std()) - 0.02) < 3e-3
    assert not block.attn.qkv.bias.any() and not block.mlp.fc1.bias.any()
    conv = generator.levels[2].to_rgb.conv  # Xavier normal at gain 0.02
    assert abs(float(conv.weight.std()) / (0.02 * (2 / (conv.in_channels + 3)) ** 0.5) - 1) < 0.2
    assert abs(float(generator.input.std()) - 1) < 0.1
    assert abs(float(block.norm1.style.weight.std()) - 1) < 0.03
    assert abs(float(generator.mapping.layers[0].weight.std()) / 100 - 1) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 2}, "generator.channels is 2"),
        ({"channels": 1}, "generator.normalization is 'imagenet'"),
        ({"normalization": "unit"}, "generator.normalization is 'unit'"),
        ({"dilations": ("1",)}, "generator.dilations has 1 levels"),
        ({"dilations": ("1", "1,x")}, "generator.dilations is"),
        ({"dilations": ("1", "0")}, "a dilation must be at least 1"),
        ({"dilations": ("3", "1")}, r"generator.dilations has 3 at 8 px; kernel_size \(3\)"),
        ({"dilations": ("1", "1,2,3,4")}, "4 partitions at 16 px, where there are 3 heads"),
        ({"dims": (16, 24, 6)}, "generator.dims has 6"),
        ({"dims": (16, 28, 12), "head_dim": 5}, "dims has 16, which its 3 heads do not divide"),
        ({"depth": 0}, "generator.depth is 0"),
        ({"kernel_size": 0}, "generator.kernel_size is 0"),
    ],
)
def test_bad_configurations_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
