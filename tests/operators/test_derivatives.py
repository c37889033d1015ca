"""First and second derivatives drop nothing: subsets, absent cotangents, tied inputs, empty batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.operators.budget import assert_equal_to_rounding
from tests.operators.cases import (
    ONE_OF_EACH,
    cotangents_of,
    derivatives,
    find,
    forward,
    grad_output_of,
    inputs_of,
    nonempty_subsets,
    on,
    oracle_derivatives,
)


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(ONE_OF_EACH)
@pytest.mark.parametrize("grad_output_needs_grad", [True, False])
def test_every_subset_of_inputs_that_require_grad(any_target, case, grad_output_needs_grad):
    """First and second derivatives for every subset of the inputs; the rest are constants."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    cotangents = cotangents_of(case, inputs)
    subsets = nonempty_subsets(inputs)
    for names in subsets[:: 4 if any_target.slow else 1]:
        tensors = on(any_target, inputs)
        for name in names:
            tensors[name].requires_grad_()
        grad_output = grad_output_of(case, tensors["query"].detach()).requires_grad_(grad_output_needs_grad)
        wanted = [tensors[name] for name in names]
        output = forward(case, tensors, any_target.backend)
        first = torch.autograd.grad(output, wanted, grad_output, create_graph=True)
        given = [cotangents[name].to(any_target.device) for name in names]
        leaves = wanted + [grad_output] * grad_output_needs_grad
        second = torch.autograd.grad(first, leaves, given, materialize_grads=True)

        results = {f"d_{name}": grad.detach() for name, grad in zip(names, first, strict=True)}
        labels = [*names, "grad_output"][: len(leaves)]
        results |= {f"dd_{name}": grad for name, grad in zip(labels, second, strict=True)}
        true = oracle_derivatives(case, inputs, grad_output, {name: cotangents[name] for name in names})
        assert_equal_to_rounding(results, {name: true[name] for name in results})


@pytest.mark.cases(ONE_OF_EACH[:3])
def test_nothing_requires_grad(any_target, case):
    inputs = inputs_of(case, torch.float32, any_target.device)
    assert not forward(case, inputs, any_target.backend).requires_grad
    inputs["query"].requires_grad_()
    assert forward(case, inputs, any_target.backend).requires_grad
    with torch.no_grad():
        assert not forward(case, inputs, any_target.backend).requires_grad
    with torch.inference_mode():
        assert forward(case, inputs, any_target.backend).is_inference()


@pytest.mark.cases(ONE_OF_EACH)
def test_backward_accumulates_into_the_leaves(any_target, case):
    """`.backward()` through a penalty gives what `autograd.grad` gives, added to what is there."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    leaves = {name: tensor.requires_grad_() for name, tensor in on(any_target, inputs).items()}
    there = on(any_target, cotangents)
    output = forward(case, leaves, any_target.backend)
    (output * grad_output.to(any_target.device)).sum().backward(create_graph=True)
    firsts = {name: leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = torch.ones_like(leaf)
    sum((firsts[name] * there[name]).sum() for name in leaves).backward()

    true = oracle_derivatives(case, inputs, grad_output, cotangents)
    results = {f"d_{name}": grad.detach() for name, grad in firsts.items()}
    results |= {f"dd_{name}": leaf.grad - 1 for name, leaf in leaves.items()}
    assert_equal_to_rounding(results, {name: true[name] for name in results})


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(ONE_OF_EACH)
def test_allow_unused_hides_nothing(any_target, case):
    """A dropped second order would come back as None here, and as a wrong penalty in training."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    leaves = {n: t.requires_grad_() for n, t in inputs_of(case, torch.float64, any_target.device).items()}
    stranger = torch.zeros(3, dtype=torch.float64, device=any_target.device, requires_grad=True)
    output = forward(case, leaves, any_target.backend)
    wanted = [*leaves.values(), stranger]
    *first, none = torch.autograd.grad(output.square().sum(), wanted, create_graph=True, allow_unused=True)
    assert none is None and all(grad is not None and grad.grad_fn is not None for grad in first)
    *second, none = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)
    assert none is None
    for name, grad in zip(leaves, second, strict=True):
        assert grad is not None and grad.abs().max() > 0, name


@pytest.mark.cases(ONE_OF_EACH)
def test_first_derivatives_are_the_same_with_and_without_a_graph(any_target, case):
    inputs = inputs_of(case, torch.float32, any_target.device)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    grad_output = grad_output_of(case, inputs["query"].detach())
    output = forward(case, leaves, any_target.backend)
    with_graph = torch.autograd.grad(output, list(leaves.values()), grad_output, create_graph=True)
    without = torch.autograd.grad(output, list(leaves.values()), grad_output, retain_graph=True)
    with torch.no_grad():
        assert torch.equal(forward(case, leaves, any_target.backend), output)
    for one, other in zip(with_graph, without, strict=True):
        assert one.requires_grad and not other.requires_grad
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("score", ["dot", "l2"])
@pytest.mark.parametrize("tied", [("key",), ("key", "value")], ids=["q-is-k", "q-is-k-is-v"])
@pytest.mark.parametrize("name", ["full-self-9", "na-7x9-k3", "grid-6x10-w3x5"])
def test_tied_inputs(any_target, name, tied, score):
    """One tensor in several places gets the sum of their derivatives, in both orders."""
    any_target.skip_unless_can(torch.float64)
    case = find(name, tied=tied, score=score)
    inputs = inputs_of(case)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    results = derivatives(
        lambda leaves: forward(case, leaves, any_target.backend),
        on(any_target, inputs),
        grad_output.to(any_target.device),
        on(any_target, cotangents),
    )
    assert_equal_to_rounding(results, oracle_derivatives(case, inputs, grad_output, cotangents))


@pytest.mark.cases([replace(case, shape=(0, *case.shape[1:])) for case in ONE_OF_EACH])
def test_an_empty_batch_has_zero_gradients(any_target, case):
    leaves = {n: t.requires_grad_() for n, t in inputs_of(case, torch.float32, any_target.device).items()}
    output = forward(case, leaves, any_target.backend)
    assert output.shape == case.shape
    first = torch.autograd.grad(output.sum(), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()), materialize_grads=True)
    for leaf, *grads in zip(leaves.values(), first, second, strict=True):
        for grad in grads:
            assert grad.shape == leaf.shape and not grad.any()
