"""Strided inputs: views of one projection, permuted dimensions, expanded batches, odd addresses, strange gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.operators.budget import assert_equal_to_rounding
from tests.operators.cases import Case, Inputs, cotangents_of, derivatives, find, forward, grad_output_of, inputs_of
from tests.operators.layouts import LAYOUTS

LAYOUT_CASES = [
    find("full-self-9"),
    find("grid-6x10-w3x5", score="l2", bias=True),
    find("na-9x10-kernels", bias=True),
    find("na-7x9-k3", score="l2", bias=True),
    find("na-shared-9x11-k3", bias=True),
]


def solve(case: Case, target, inputs: Inputs, grad_output: Tensor, cotangents: Inputs) -> Inputs:
    return derivatives(lambda leaves: forward(case, leaves, target.backend), inputs, grad_output, cotangents)


@pytest.mark.cases(LAYOUT_CASES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_layout_changes_nothing(any_target, case, layout: Callable[[Inputs], Inputs]):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case, torch.float64, any_target.device)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    expected = solve(case, any_target, inputs, grad_output, cotangents)
    strided = layout(inputs)
    assert all(torch.equal(strided[n], inputs[n]) for n in inputs)
    strided_grad = layout(inputs | {"query": grad_output})["query"]
    results = solve(case, any_target, strided, strided_grad, layout(cotangents))
    assert_equal_to_rounding(results, expected, 1e-13)


@pytest.mark.cases(LAYOUT_CASES)
def test_expanded_batch_and_heads(any_target, case):
    """Strides of zero: one key and value for the whole batch, one query for all heads."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case, torch.float64, any_target.device)
    for name in ("key", "value"):
        inputs[name] = inputs[name][:1].expand(inputs[name].shape)
    inputs["query"] = inputs["query"][..., :1, :].expand(inputs["query"].shape)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    dense = {n: t.contiguous() for n, t in inputs.items()}
    expected = solve(case, any_target, dense, grad_output, cotangents)
    assert_equal_to_rounding(solve(case, any_target, inputs, grad_output, cotangents), expected, 1e-13)


@pytest.mark.cases(LAYOUT_CASES)
def test_the_gradient_of_a_sum(any_target, case):
    """`out.sum().backward()` hands over a gradient whose strides are all zero; so does its double backward."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case, torch.float64, any_target.device)
    ones = torch.ones_like(inputs["query"])
    every_one = {n: torch.ones_like(t) for n, t in inputs.items()}
    expected = solve(case, any_target, inputs, ones, every_one)

    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    output = forward(case, leaves, any_target.backend)
    first = torch.autograd.grad(output.sum(), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), list(leaves.values()))
    results = {f"d_{n}": g.detach() for n, g in zip(leaves, first, strict=True)}
    results |= {f"dd_{n}": g for n, g in zip(leaves, second, strict=True)}
    assert_equal_to_rounding(results, {n: expected[n] for n in results}, 1e-13)


@pytest.mark.cases(LAYOUT_CASES[:2])
def test_gradients_have_the_shape_dtype_and_no_alias_of_the_inputs(any_target, case):
    inputs = inputs_of(case, torch.float32, any_target.device)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    before = {n: t.detach().clone() for n, t in inputs.items()}
    output = forward(case, leaves, any_target.backend)
    grads = torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))
    pointers = {t.untyped_storage().data_ptr() for t in [*leaves.values(), output]}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype and grad.device == leaf.device
        assert grad.untyped_storage().data_ptr() not in pointers
        assert torch.equal(leaf, before[name]), f"{name} was written to"


def test_a_map_larger_than_its_batch_stride(any_target):
    """Overlapping images: a stride smaller than an image is legal for reading."""
    any_target.skip_unless_can(torch.float64)
    strip = torch.randn(1, 10, 6, 2, 8, dtype=torch.float64, device=any_target.device)
    row = strip.stride(1)
    overlapping = strip.as_strided((3, 6, 6, 2, 8), (row, *strip.stride()[1:]))
    case = Case("overlap", "neighborhood", (3, 6, 6, 2, 8), kernel=3)
    maps = {"query": overlapping, "key": overlapping, "value": overlapping}
    result = forward(case, maps, any_target.backend)
    expected = forward(case, {n: t.contiguous() for n, t in maps.items()}, any_target.backend)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)
