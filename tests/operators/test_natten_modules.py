"""NATTEN's modules: what each generation's constructor makes of its arguments; they attend like the functions."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

import natten_ext
from natten_ext import compat
from natten_ext.compat import natten_014, natten_017, natten_021

GENERATIONS = (natten_014, natten_017, natten_021)
EXTENTS = (5, 7, 9)


def maps(axes: int, channels: int = 8) -> torch.Tensor:
    return torch.randn(2, *EXTENTS[3 - axes :], channels)


def module_of(generation, axes: int) -> type[torch.nn.Module]:
    return getattr(generation, f"NeighborhoodAttention{axes}D")


def with_table(generation) -> dict[str, bool]:
    return {"bias": True} if generation is natten_014 else {"rel_pos_bias": True}


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_modules_are_projections_around_attention(generation, axes):
    x = maps(axes).requires_grad_()
    options = {"qk_scale": 0.3} | with_table(generation)
    options |= {} if generation is natten_014 else {"is_causal": axes == 1, "stride": 2}
    module = module_of(generation, axes)(8, 2, 3, dilation=1, **options)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "rpb": (2, *[5] * axes),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }
    query, key, value = module.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    windows = {"is_causal": axes == 1, "stride": 2} if generation is not natten_014 else {}
    expected = natten_ext.neighborhood_attention(query, key, value, 3, **windows, bias=module.rpb, scale=0.3)
    expected = module.proj(expected.flatten(-2))
    torch.testing.assert_close(module(x), expected)
    leaves = [x, *module.parameters()]
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(module(x), leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent)
    )
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (natten_014, ["dim", "num_heads", "kernel_size", "dilation", "bias", "qkv_bias", "qk_scale", "attn_drop"]),
        (
            natten_017,
            ["dim", "num_heads", "kernel_size", "dilation", "is_causal", "rel_pos_bias", "qkv_bias", "qk_scale"],
        ),
        (
            natten_021,
            ["embed_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal", "qkv_bias", "qk_scale"],
        ),
    ],
)
def test_signatures(generation, expected):
    names = list(inspect.signature(generation.NeighborhoodAttention2D).parameters)
    assert names[:8] == expected
    assert "proj_drop" in names


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_dropout_of_weights(axes):
    """In training by the unfused functions, of which each row of weights then counts in part; never in evaluation."""
    x, module = (
        maps(axes),
        module_of(compat, axes)(8, 2, 3, None, attn_drop=0.5, is_causal=axes == 2, rel_pos_bias=True),
    )
    fused = module_of(compat, axes)(8, 2, 3, is_causal=axes == 2, rel_pos_bias=True)
    fused.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(x), fused(x))
    module.train()
    torch.manual_seed(1)
    once = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), once)
    assert not torch.allclose(once, fused(x))
    module.attn_drop.p = 1e-9
    torch.testing.assert_close(module(x), fused(x))


def test_what_constructors_take():
    old, current, new = (generation.NeighborhoodAttention2D for generation in GENERATIONS)
    assert old(8, 2, 3).rpb is not None and old(8, 2, 3, bias=False).rpb is None
    assert current(dim=8, num_heads=2, kernel_size=3).rpb is None and new(8, 2, 3).rpb is None
    assert current(embed_dim=8, num_heads=2, kernel_size=3, bias=True).rpb is not None
    assert current(8, 2, [3, 5], dilation=None, rel_pos_bias=True, qkv_bias=False).rpb.shape == (2, 5, 9)
    assert old(8, 2, 3, dilation=None).dilation == (1, 1)
    deep = natten_014.NeighborhoodAttention3D(8, 2, 3, 2, kernel_size_d=5, dilation_d=1)
    assert (deep.kernel_size, deep.dilation) == ((5, 3, 3), (1, 2, 2))
    with pytest.raises(TypeError, match="num_heads must be given"):
        current(8, kernel_size=3)
    with pytest.raises(ValueError, match="num_heads must divide the channels 8, got 3"):
        new(8, 3, 3)
    with pytest.raises(ValueError, match="stride must not exceed kernel_size"):
        new(8, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="attn_drop: natten_ext does not support dropout of attention"):
        current(8, 2, 3, attn_drop=0.1, stride=2)
    with pytest.raises(ValueError, match=r"input must be \(batch, height, width, channels\) with 8 channels"):
        new(8, 2, 3)(torch.zeros(2, 8, 5, 5))


def test_small_maps_were_padded_before_0_17():
    """With zeros, after the map's end: as if the map were larger, and cut again."""
    module = natten_014.NeighborhoodAttention2D(8, 2, 3, 2)
    x = torch.randn(1, 7, 4, 8)
    larger = torch.zeros(1, 7, 6, 8)
    larger[:, :, :4] = x
    torch.testing.assert_close(module(x), module(larger)[:, :, :4])
    with pytest.raises(ValueError, match="kernel_size \\* dilation"):
        compat.NeighborhoodAttention2D(8, 2, 3, 2)(x)
