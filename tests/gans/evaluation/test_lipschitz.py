"""ViTGAN's claim: tied L2 attention is Lipschitz, dot-product attention is not. Measured, in float64."""

from __future__ import annotations

import pytest
import torch

from gans.evaluation.lipschitz import VARIANTS, ascend, local_ratio, of_size, sweep
from gans.models.vitgan_layers import ViTAttention

SCALES = [0.25, 1.0, 4.0, 16.0, 64.0]


def attention(**options) -> ViTAttention:
    torch.manual_seed(0)
    return ViTAttention(24, 3, **options).double().requires_grad_(False)


def test_local_ratio_is_the_largest_singular_value_of_the_jacobian():
    module = attention(score="l2")
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    ratios = local_ratio(module, x, iterations=300)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda y: module(y[None])[0], x[i]).reshape(120, 120)
        torch.testing.assert_close(ratios[i], torch.linalg.matrix_norm(jacobian, 2), rtol=1e-6, atol=0)


def test_ascent_keeps_the_size_and_finds_more_than_chance():
    module = attention(score="dot", tied=False, values="plain")
    start = torch.randn(3, 5, 24, dtype=torch.float64)
    found = ascend(module, start, 2.0, steps=60)
    torch.testing.assert_close(found.square().mean((1, 2)).sqrt(), torch.full((3,), 2.0).double())
    assert (local_ratio(module, found) > 2 * local_ratio(module, of_size(start, 2.0))).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_growth_with_the_size_of_the_input(variant):
    torch.manual_seed(1)
    randoms, adversaries = sweep(attention(**VARIANTS[variant]), SCALES, tokens=9, count=3, steps=25)
    growth = adversaries[-1] / adversaries[SCALES.index(1.0)]
    if variant == "dot product":  # grows without bound, for random inputs until softmax is exactly 0 or 1
        assert growth > 50
        assert max(randoms) > 10 * randoms[0]
    elif "plain" in variant:  # random inputs do not show it; where a head cannot see what differs, it grows
        assert max(randoms) < 3 * randoms[0]
        assert growth > 10
    else:  # bounded: nothing found at large sizes exceeds what was found at small ones
        assert max(randoms) < 3 * randoms[0]
        assert max(adversaries[2:]) <= 1.5 * max(adversaries[:2])


def test_untied_l2_attention_is_not_lipschitz():
    """Kim et al. need query and key to be one projection."""
    torch.manual_seed(1)
    module = attention(score="l2", tied=False)
    _, adversaries = sweep(module, SCALES, tokens=9, count=3, steps=25)
    assert adversaries[-1] > 10 * adversaries[SCALES.index(1.0)]
