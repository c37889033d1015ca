"""The modules: what they compute, their parameters, their NATTEN-like arguments, saving and copying."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import natten_ext

SEQUENCE, MAP = (2, 9, 24), (2, 6, 8, 24)

# (make a module, the shape of its input, the shape of its table)
MODULES = {
    "attention": (lambda **o: natten_ext.Attention(24, 3, **o), SEQUENCE, None),
    "attention-l2": (lambda **o: natten_ext.Attention(24, 3, score="l2", **o), SEQUENCE, None),
    "l2": (lambda **o: natten_ext.L2Attention(24, 3, **o), SEQUENCE, None),
    "grid": (lambda **o: natten_ext.GridAttention(24, 3, (3, 4), **o), MAP, (3, 5, 7)),
    "grid-l2": (lambda **o: natten_ext.GridAttention(24, 3, 2, score="l2", **o), MAP, (3, 3, 3)),
    "grid-no-table": (lambda **o: natten_ext.GridAttention(24, 3, 2, bias=False, **o), MAP, None),
    "na": (lambda **o: natten_ext.NeighborhoodAttention(24, 4, 3, 2, **o), MAP, (4, 5, 5)),
    "na-hydra": (
        lambda **o: natten_ext.NeighborhoodAttention(24, 4, [(3, 5), 2], [1, (3, 4)], **o),
        MAP,
        (4, 5, 9),
    ),
    "na-no-table": (lambda **o: natten_ext.NeighborhoodAttention(24, 4, 3, bias=False, **o), MAP, None),
}


def by_hand(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """The module's computation with its parameters and the public functions."""
    parts = 2 if name == "l2" else 3
    chunks = nn.functional.linear(x, module.qkv.weight, module.qkv.bias).chunk(parts, -1)
    q, k, v = (c.reshape(*x.shape[:-1], module.num_heads, -1) for c in (chunks if parts == 3 else (chunks[0], *chunks)))
    options = {"scale": module.scale, "backend": "reference"}
    score = "l2" if "l2" in name else "dot"
    table = module.rel_pos_bias
    if name.startswith("grid"):
        window = (3, 4) if name == "grid" else 2
        output = natten_ext.grid_attention(q, k, v, window, bias=table, score=score, **options)
    elif name.startswith("na"):
        setting = {"na": (3, 2), "na-hydra": ([(3, 5), 2], [1, (3, 4)]), "na-no-table": (3, 1)}[name]
        output = natten_ext.neighborhood_attention(q, k, v, *setting, bias=table, score=score, **options)
    else:
        output = natten_ext.attention(q, k, v, score=score, **options)
    return nn.functional.linear(output.reshape(x.shape), module.proj.weight, module.proj.bias)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "proj_bias": False, "scale": 0.7}], ids=["default", "set"])
def test_module_is_its_composition(any_target, name, options):
    any_target.skip_unless_can(torch.float64)
    make, shape, _ = MODULES[name]
    module = make(backend=any_target.backend, **options).double().to(any_target.device)
    x = torch.randn(shape, dtype=torch.float64, device=any_target.device, requires_grad=True)
    wanted = [x, *module.parameters()]
    results = []
    for output in (module(x), by_hand(name, module, x)):
        grads = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
        results.append([output, *grads, *second])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MODULES)
def test_parameters(name):
    make, _, table = MODULES[name]
    module = make()
    parts = 2 if name == "l2" else 3
    expected = {"qkv.weight": (parts * 24, 24), "qkv.bias": (parts * 24,), "proj.weight": (24, 24), "proj.bias": (24,)}
    if table is not None:
        expected["rel_pos_bias"] = table
    else:
        assert module.rel_pos_bias is None
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == expected
    slim = dict(make(qkv_bias=False, proj_bias=False).named_parameters())
    assert "qkv.bias" not in slim and "proj.bias" not in slim
    assert all(p.requires_grad for p in module.parameters())


def test_the_table_starts_small_and_normal():
    table = natten_ext.NeighborhoodAttention(64, 32, 13).rel_pos_bias
    assert 0.018 < table.std() < 0.022 and table.abs().max() < 0.2 and table.mean().abs() < 1e-3


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_deepcopy_and_saving(name):
    make, shape, _ = MODULES[name]
    module, other = make(), make()
    x = torch.randn(shape)
    assert not torch.equal(module(x), other(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x), other(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    third = make()
    third.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(third(x), module(x))


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_gets_a_gradient(any_target, name):
    make, shape, _ = MODULES[name]
    module = make(backend=any_target.backend).to(any_target.device)
    module(torch.randn(shape, device=any_target.device)).square().sum().backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
        if parameter_name != "qkv.bias":
            assert parameter.grad.abs().max() > 0, parameter_name


def test_repr_says_what_it_is():
    module = natten_ext.NeighborhoodAttention(24, 4, [3, 5], [1, 2], score="l2", backend="reference")
    for piece in ("24", "4", "[3, 5]", "[1, 2]", "l2", "reference"):
        assert piece in repr(module)
    assert "(3, 4)" in repr(natten_ext.GridAttention(24, 3, (3, 4)))
    assert "map_axes=3" in repr(natten_ext.GridAttention(24, 3, 4, map_axes=3))
    assert "map_axes=1" in repr(natten_ext.NeighborhoodAttention(24, 3, 4, map_axes=1))


def test_small_maps_are_padded_if_asked_for():
    """As in DiNAT: zeros at the ends before the projection, whose places are attended, and the map's own come out."""
    module = natten_ext.NeighborhoodAttention(8, 2, [3, 5], [2, 1], pad_small=True).double()
    plain = natten_ext.NeighborhoodAttention(8, 2, [3, 5], [2, 1]).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    whole = torch.cat([x, x.new_zeros(2, 2, 9, 8)], 1)
    assert module(x).shape == x.shape
    torch.testing.assert_close(module(x), plain(whole)[:, :4])
    weights = module.attention_weights(x, [(3, 8)])
    torch.testing.assert_close(weights, plain.attention_weights(whole, [(3, 8)]))
    large = torch.randn(1, 6, 7, 8, dtype=torch.float64)
    assert torch.equal(module(large), plain(large))
    with pytest.raises(ValueError, match="3 \\* 2 > height 4"):
        plain(x)
    with pytest.raises(ValueError, match=r"8 channels, got shape \(2, 4, 9, 7\)"):  # the caller's, not the padded one
        module(x[..., :7])
    assert "pad_small=True\n" in repr(module) and "pad_small" not in repr(plain)
    with pytest.raises(TypeError, match="pad_small"):
        natten_ext.NeighborhoodAttention(8, 2, 3, pad_small=1)


@pytest.mark.parametrize("name", MODULES)
def test_dtype_moves_and_autocast(any_target, name):
    any_target.skip_unless_can(torch.bfloat16)
    make, shape, _ = MODULES[name]
    module = make(backend=any_target.backend).to(any_target.device)
    x = torch.randn(shape, device=any_target.device)
    full = module(x)
    with torch.autocast(any_target.device, dtype=torch.bfloat16):
        autocast = module(x)
    half = module.bfloat16()(x.bfloat16())
    assert autocast.dtype == half.dtype == torch.bfloat16
    for result in (autocast, half):
        torch.testing.assert_close(result.float(), full, rtol=0.05, atol=0.05)


def test_l2_attention_ties_query_and_key():
    """The same as an untied module whose query and key projections are equal."""
    tied = natten_ext.L2Attention(24, 3)
    untied = natten_ext.Attention(24, 3, score="l2")
    with torch.no_grad():
        for field in ("weight", "bias"):
            shared, value = getattr(tied.qkv, field).chunk(2)
            getattr(untied.qkv, field).copy_(torch.cat([shared, shared, value]))
        untied.proj.load_state_dict(tied.proj.state_dict())
    x = torch.randn(SEQUENCE)
    torch.testing.assert_close(tied(x), untied(x))


def test_lists_of_the_caller_may_change_afterwards():
    kernels, dilations = [3, 5], [2, 1]
    module = natten_ext.NeighborhoodAttention(8, 2, kernels, dilations)
    x = torch.randn(1, 8, 8, 8)
    before = module(x)
    kernels.reverse()
    dilations.append(1)
    assert torch.equal(module(x), before)


def test_use_backend_reaches_modules():
    module = natten_ext.Attention(16, 2)
    x = torch.randn(2, 5, 16)
    with natten_ext.use_backend("reference"):
        grad_fn = module(x)
    torch.testing.assert_close(grad_fn, module(x))
