"""Path length regularisation: from the Jacobian, through the fused double backward, where an image has no slope."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import natten_ext
from gans.losses.path_length import PathLengthLoss, PathLengthLossConfig, path_lengths
from tests.gans.style_generators import CONFIGS, generator_of


class Slopes(nn.Module):
    """Images with the slope `weight * gates[image]` by w, of one block: 2 x 2 pixels, two numbers in w."""

    def __init__(self, gates) -> None:
        super().__init__()
        self.config = SimpleNamespace(blocks=1)
        self.gates = torch.tensor(gates, dtype=torch.float64)[:, None]
        self.weight = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))

    def map_latents(self, z):
        return z.requires_grad_(True)

    def synthesize(self, w):
        return (self.gates * (w[:, 0] @ self.weight)).view(-1, 1, 2, 2)


def test_an_image_that_ignores_w_has_length_0_and_no_share_in_the_gradient():
    torch.manual_seed(0)
    generator = Slopes([1.0, 0.0, 2.0])
    loss = PathLengthLoss(PathLengthLossConfig(path_length=1.0, path_length_every=1, path_length_decay=1.0)).double()
    torch.manual_seed(3)
    term = loss.generator_penalty(generator, torch.randn(3, 2, dtype=torch.float64), step=0)["path_length"]
    (gradient,) = torch.autograd.grad(term, generator.weight)

    torch.manual_seed(3)
    torch.randn(3, 2, dtype=torch.float64)
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64).flatten(1) / 2
    slopes = generator.gates * (noise @ generator.weight.t())
    lengths = [slopes[image].square().sum().sqrt() for image in (0, 2)]  # image 1 is left out, not at its root
    mean = (lengths[0] + lengths[1]).detach() / 3
    expected = (sum((length - mean) ** 2 for length in lengths) + mean**2) / 3
    torch.testing.assert_close(term, expected)
    torch.testing.assert_close(loss.mean_length, mean)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, generator.weight)[0])


SMALLER = {
    name: replace(config, dims=(8, 12), dilations=("1,2",), depth=1) if name == "stylenat" else config
    for name, config in CONFIGS.items()
}


@pytest.mark.parametrize("name", SMALLER)
def test_path_lengths_from_the_jacobian(name):
    generator = generator_of(SMALLER[name])
    z = torch.randn(2, 6).double()
    torch.manual_seed(3)
    lengths = path_lengths(generator, z)
    torch.manual_seed(3)
    noise = torch.randn(2, 3, 8, 8, dtype=torch.float64) / 8
    w = generator.map_latents(z)[:, None].expand(-1, generator.config.blocks, -1).contiguous()
    jacobian = torch.autograd.functional.jacobian(generator.synthesize, w)  # (2, 3, 8, 8, 2, blocks, 6)
    for image in range(2):
        pulled = torch.einsum("chw,chwnd->nd", noise[image], jacobian[image, :, :, :, image])
        torch.testing.assert_close(lengths[image], pulled.square().sum(1).mean().sqrt())


@pytest.mark.parametrize(("name", "tables"), [*zip(CONFIGS, (6, 0, 0, 0), strict=True)])
def test_path_length_differentiates_the_fused_attention_twice(name, tables):
    generator = generator_of(CONFIGS[name])
    loss = PathLengthLoss(PathLengthLossConfig(path_length_decay=0.5)).double()
    z = torch.randn(2, 6).double()

    def gradients(backend: str) -> dict[str, torch.Tensor]:
        generator.zero_grad(set_to_none=True)
        loss.mean_length.zero_()
        torch.manual_seed(5)
        with natten_ext.use_backend(backend):
            (term,) = loss.generator_penalty(generator, z, step=4).values()
            term.backward()
        return {name: p.grad for name, p in generator.named_parameters() if p.grad is not None}

    fused, expected = gradients("cpu"), gradients("reference")
    assert fused.keys() == expected.keys()
    # What has no part in the derivative by w: what adds to the image without passing a modulated norm.
    assert {n for n, _ in generator.named_parameters()} - fused.keys() <= {
        n for n, _ in generator.named_parameters() if n.endswith("bias")
    } | {"input"}
    assert sum(name.endswith("rel_pos_bias") for name in fused) == tables
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0 or not name.endswith(("rel_pos_bias", "qkv.weight", "query.weight"))
        torch.testing.assert_close(fused[name], gradient, rtol=1e-8, atol=1e-9 * max(scale, 1e-3))


def test_path_length_is_lazy_and_remembers_its_mean():
    generator, z = generator_of(CONFIGS["stylenat"]), torch.randn(2, 6).double()
    loss = PathLengthLoss(PathLengthLossConfig(path_length=3.0, path_length_every=4, path_length_decay=0.25)).double()
    assert loss.generator_penalty(generator, z, step=1) == {}
    torch.manual_seed(9)
    lengths = path_lengths(generator, z)
    torch.manual_seed(9)
    term = loss.generator_penalty(generator, z, step=8)["path_length"]
    mean = 0.25 * lengths.mean()
    torch.testing.assert_close(term, 4 * 3 * (lengths - mean).square().mean())
    torch.testing.assert_close(loss.state_dict()["mean_length"], mean.detach())
    off = PathLengthLoss(PathLengthLossConfig(path_length=0.0))
    assert off.generator_penalty(generator, z, step=0) == {}
