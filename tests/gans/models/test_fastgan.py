"""FastGAN's generator by its definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gans.models.fastgan import FastGANGeneratorConfig, Gate, Generator, PixelNoise, UpBlock
from gans.models.spectral_norm import SpectralConv2d

TINY = FastGANGeneratorConfig(latent_dim=6, image_size=64, width=8)


def test_published_channels_and_gates():
    config = FastGANGeneratorConfig(image_size=1024)
    dims = [config.dim(size) for size in config.sizes]
    assert dims == [2048, 1024, 512, 256, 256, 128, 64, 32, 16]
    assert config.gates == {64: 4, 128: 8, 256: 16, 512: 32}
    assert FastGANGeneratorConfig().gates == {64: 4, 128: 8, 256: 16}
    assert replace(TINY, image_size=32).gates == {}
    assert replace(TINY, image_size=32, skip_ratio=8).gates == {32: 4}
    assert replace(TINY, skip_ratio=0).gates == {}


@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_shapes_and_parts(size, lite):
    generator = Generator(replace(TINY, image_size=size, lite=lite, channels=1)).eval()
    assert generator(torch.randn(2, 6)).shape == (2, 1, size, size)
    levels = len(generator.blocks)
    assert sum(isinstance(m, PixelNoise) for m in generator.modules()) == (0 if lite else 2 * levels)
    convs = [m for m in generator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(isinstance(conv, SpectralConv2d) for conv in convs)
    assert len(convs) == levels * (1 if lite else 2) + 2 * len(generator.gates) + 1


def test_what_the_generator_computes():
    """Two levels of a lite generator and one gate, written out."""
    torch.manual_seed(3)
    generator = Generator(replace(TINY, image_size=32, lite=True, skip_ratio=8)).double().eval()
    z = torch.randn(2, 6).double()

    def glu(x):
        a, b = x.chunk(2, 1)
        return a * torch.sigmoid(b)

    def norm(x):  # in evaluation, with the statistics it starts with
        return x / (1 + 1e-5) ** 0.5

    unit = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    weight = generator.input[0].normalized_weight()
    x = glu(norm(torch.einsum("bi,iohw->bohw", unit, weight)))
    maps = {4: x}
    for size in (8, 16, 32):
        conv = generator.blocks[str(size)][1][0]
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = glu(norm(F.conv2d(x, conv.normalized_weight(), padding=1)))
        maps[size] = x
    gate = generator.gates["32"]
    squeezed = torch.einsum("bchw,ochw->bo", maps[4], gate.squeeze.normalized_weight())
    squeezed = squeezed * torch.sigmoid(squeezed)
    share = torch.sigmoid(squeezed @ gate.excite.normalized_weight()[:, :, 0, 0].T)
    x = x * share[:, :, None, None]
    expected = F.conv2d(x, generator.to_rgb.normalized_weight(), generator.to_rgb.bias, padding=1)
    torch.testing.assert_close(generator(z), expected)
    torch.testing.assert_close(generator(3 * z), expected)


def test_noise_is_one_number_a_pixel_and_starts_at_zero():
    noise = PixelNoise()
    x = torch.randn(2, 4, 3, 5)
    assert torch.equal(noise(x), x)
    noise.strength.data.fill_(0.5)
    added = noise(x) - x
    torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-6, rtol=0)
    assert added[:, 0].unique().numel() == 30


def test_gates_pool_larger_maps_to_16_numbers_a_channel():
    gate = Gate(3, 5)
    small, large = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 6, 6)
    torch.testing.assert_close(gate(small, large), gate(F.avg_pool2d(small, 2), large))


def test_levels_double_the_side_by_nearest_neighbours():
    block = UpBlock(4, 6, lite=False).eval()
    assert block(torch.randn(1, 4, 5, 5)).shape == (1, 6, 10, 10)
    assert torch.equal(
        block[0](torch.eye(2)[None, None]), torch.eye(2).repeat_interleave(2, 0).repeat_interleave(2, 1)[None, None]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 16}, "generator.image_size is 16"),
        ({"image_size": 96}, "generator.image_size is 96"),
        ({"channels": 2}, "generator.channels is 2"),
        ({"latent_dim": 0}, "generator.latent_dim is 0"),
        ({"width": 12}, "generator.width is 12"),
        ({"skip_ratio": 3}, "generator.skip_ratio is 3"),
        ({"skip_ratio": 1}, "generator.skip_ratio is 1"),
    ],
)
def test_bad_configurations_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
