"""Torch's default device and dtype decide where new parameters live, and nothing about a call on given tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import natten_ext
from natten_ext import compat
from tests.operators.cases import cotangents_of, derivatives, find, forward, grad_output_of, inputs_of

SOME = [
    find("full-self-9", score="l2"),
    find("grid-6x10-w3x5", bias=True),
    find("na-7x9-k3", score="l2", bias=True),
    find("na-9x10-kernels", bias=True),
]


@contextmanager
def other_defaults() -> Iterator[None]:
    """Tensors that name no device have no contents here, so whoever makes one fails; and float64 instead of float32."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.cases(SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_every_order_of_every_backend(any_target, case, dtype):
    any_target.skip_unless_can(dtype, case.head_dim)
    inputs = inputs_of(case, dtype, any_target.device)
    arguments = inputs, grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    expected = derivatives(lambda leaves: forward(case, leaves, any_target.backend), *arguments)
    with other_defaults():
        results = derivatives(lambda leaves: forward(case, leaves, any_target.backend), *arguments)
    for name, result in results.items():
        assert result.dtype == expected[name].dtype and torch.equal(result, expected[name]), name


def unfused(query: Tensor, rpb: Tensor) -> Tensor:
    maps = query.movedim(3, 1)
    scores = compat.na2d_qk(maps, maps, (3, 2), (1, 2), rpb=rpb)
    return compat.na2d_av(scores, maps, (3, 2), (1, 2))


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "unfused": unfused,
    "weights of everything": lambda q, t: natten_ext.attention_weights(q, q, [(1, 2), (0, 0)]),
    "weights of a window": lambda q, t: natten_ext.attention_weights(q, q, [(1, 2)], window_size=(3, 2), bias=t),
    "weights of a kernel": lambda q, t: natten_ext.attention_weights(q, q, [(1, 2)], kernel_size=(3, 2), bias=t),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions(name):
    query, table = torch.randn(2, 3, 4, 2, 8), torch.randn(2, 5, 3)
    query, table = (tensor.requires_grad_() for tensor in (query, table))

    def gradients() -> list[Tensor | None]:
        output = OTHERS[name](query, table)
        return [output, *torch.autograd.grad(output.square().sum(), (query, table), allow_unused=True)]

    expected = gradients()
    with other_defaults():
        results = gradients()
    for one, other in zip(results, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("name", ["Attention", "L2Attention", "GridAttention", "NeighborhoodAttention"])
def test_modules(name):
    """Parameters follow the defaults, as those of torch's modules do; calls do not."""
    sizes = {"GridAttention": [(2, 3)], "NeighborhoodAttention": [3]}.get(name, [])
    module = getattr(natten_ext, name)(16, 2, *sizes)
    x = torch.randn(2, 4, 6, 16) if sizes else torch.randn(2, 9, 16)
    expected = module(x)
    with other_defaults():
        assert torch.equal(module(x), expected)
        made = getattr(natten_ext, name)(16, 2, *sizes)
    assert all(p.is_meta and p.dtype == torch.float64 for p in made.parameters())
