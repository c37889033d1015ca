"""Tangents of the attention, and every mix of two derivatives that forward mode takes part in."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import natten_ext
from tests.operators.budget import assert_equal_to_rounding
from tests.operators.cases import (
    ONE_OF_EACH,
    TINY,
    Case,
    Inputs,
    arguments_of,
    cotangents_of,
    derivatives,
    find,
    forward,
    grad_output_of,
    inputs_of,
    nonempty_subsets,
    on,
    oracle_forward,
)

SOME = [
    find("full-self-9"),
    find("full-cross-13x29", score="l2"),
    find("grid-6x10-w3x5", score="l2", bias=True),
    find("na-7x9-k3", bias=True),
    find("na-8x6-k4"),
    find("na-11x9-per-head", score="l2", bias=True),
    find("grid-batch-0", bias=True),
]
SOME += [case for case in TINY if case.bias]


def tangent_of(function, inputs: Inputs, tangents: Inputs) -> Tensor | None:
    """Forward mode; of what has no tangent, there is none."""
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(x, tangents[n]) if n in tangents else x for n, x in inputs.items()}
        return forward_ad.unpack_dual(function(duals)).tangent


def true_tangent(case: Case, inputs: Inputs, tangents: Inputs) -> Tensor:
    """J t of the oracle, by reverse mode twice: the derivative by y of <t, J^T y>."""
    zeros = grad_output_of(case, inputs["query"]).mul(0)
    return derivatives(lambda leaves: oracle_forward(case, leaves), inputs, zeros, tangents)["dd_grad_output"]


@pytest.mark.cases(SOME)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tangents_of_every_subset_of_inputs(any_target, case, requires_grad):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    tangents = cotangents_of(case, inputs)
    for names in nonempty_subsets(inputs)[:: 4 if any_target.slow else 1]:
        given = {name: tangents[name] for name in names}
        there = {n: x.requires_grad_(requires_grad) for n, x in on(any_target, inputs).items()}
        result = tangent_of(lambda x: forward(case, x, any_target.backend), there, on(any_target, given))
        assert result.requires_grad == requires_grad
        assert_equal_to_rounding({"t": result.detach()}, {"t": true_tangent(case, inputs, given)}, 1e-12)


@pytest.mark.cases(SOME)
def test_no_tangent_without_one(target, case):
    inputs = inputs_of(case, torch.float32, target.device)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(forward(case, inputs, target.backend)).tangent is None


def second_order(attend, inputs: Inputs, grad_output: Tensor, tangents: Inputs) -> Inputs:
    """Of <y, J t>, by reverse mode over reverse mode: its gradients in the inputs, t and y."""
    second = derivatives(attend, inputs, grad_output, tangents)
    return (
        {f"in {n}": second[f"dd_{n}"] for n in inputs}
        | {f"in t {n}": second[f"d_{n}"] for n in tangents}
        | {"in y": second["dd_grad_output"]}
    )


@pytest.mark.cases(SOME)
def test_reverse_over_forward(any_target, case):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    tangents, y = cotangents_of(case, inputs), grad_output_of(case, inputs["query"])
    for names in nonempty_subsets(inputs)[:: -5 if any_target.slow else -3]:
        chosen = {name: tangents[name] for name in names}
        leaves = {n: x.requires_grad_() for n, x in on(any_target, {n: x.clone() for n, x in inputs.items()}).items()}
        directions = {n: x.requires_grad_() for n, x in on(any_target, chosen).items()}
        weights = y.to(any_target.device).requires_grad_()
        slope = (tangent_of(lambda x: forward(case, x, any_target.backend), leaves, directions) * weights).sum()
        wanted = [*leaves.values(), *directions.values(), weights]
        labels = [*(f"in {n}" for n in leaves), *(f"in t {n}" for n in directions), "in y"]
        grads = torch.autograd.grad(slope, wanted, materialize_grads=True)
        results = dict(zip(labels, grads, strict=True))
        for tensor in (*tangents.values(), y):
            tensor.requires_grad_(False)
        assert_equal_to_rounding(results, second_order(partial(oracle_forward, case), inputs, y, chosen), 1e-12)


@pytest.mark.cases(SOME)
@pytest.mark.parametrize("along", ["inputs", "grad_output", "both"])
def test_forward_over_reverse(any_target, case, along):
    """Tangents of the gradients, along tangents of the inputs and of the incoming gradient."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    tangents, y = cotangents_of(case, inputs), grad_output_of(case, inputs["query"])
    s = cotangents_of(case, {"y": y})["y"]
    there = {n: x.requires_grad_() for n, x in on(any_target, {n: x.clone() for n, x in inputs.items()}).items()}
    with forward_ad.dual_level():
        moved = along != "grad_output"
        duals = {n: forward_ad.make_dual(x, tangents[n].to(x.device)) if moved else x for n, x in there.items()}
        weights = y.to(any_target.device)
        if along != "inputs":
            weights = forward_ad.make_dual(weights, s.to(any_target.device))
        output = forward(case, duals, any_target.backend)
        grads = torch.autograd.grad(output, list(duals.values()), weights)
        results = {n: forward_ad.unpack_dual(g).tangent for n, g in zip(inputs, grads, strict=True)}
    zeros = {n: torch.zeros_like(x) for n, x in inputs.items()}
    by_inputs = second_order(partial(oracle_forward, case), inputs, y, tangents if moved else zeros)
    by_y = derivatives(lambda leaves: oracle_forward(case, leaves), inputs, s, order=1)
    true = {n: by_inputs[f"in {n}"] + (by_y[f"d_{n}"] if along != "inputs" else 0) for n in inputs}
    assert_equal_to_rounding(results, true, 1e-12)


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(SOME[2:4])
def test_a_third_derivative_and_forward_over_forward_raise(target, case):
    inputs = inputs_of(case, torch.float32, target.device)
    query, t = inputs["query"], torch.ones_like(inputs["query"])

    def f(query: Tensor) -> Tensor:
        return forward(case, inputs | {"query": query}, target.backend).sin().sum()

    func = torch.func
    for message, mixed in {
        "forward mode over forward mode": lambda q: func.jvp(lambda q: func.jvp(f, (q,), (t,))[1], (q,), (t,)),
        "third derivative.*reference": lambda q: func.jvp(func.grad(lambda q: func.grad(f)(q).sin().sum()), (q,), (t,)),
        "the third derivative": lambda q: func.grad(lambda q: func.jvp(func.grad(f), (q,), (t,))[1].sin().sum())(q),
        "third": lambda q: func.grad(lambda q: func.grad(lambda q: func.grad(f)(q).sin().sum())(q).sin().sum())(q),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            mixed(query)


@pytest.mark.cases(SOME[2:4])
def test_tangents_in_half_precision(any_target, case):
    any_target.skip_unless_can(torch.bfloat16, case.head_dim)
    inputs = {n: x.bfloat16() for n, x in inputs_of(case).items()}
    tangents = {n: x.bfloat16() for n, x in cotangents_of(case, inputs).items()}
    there = on(any_target, inputs), on(any_target, tangents)
    result = tangent_of(lambda x: forward(case, x, any_target.backend), *there)
    assert result.dtype == torch.bfloat16
    true = true_tangent(case, *({n: x.double() for n, x in y.items()} for y in (inputs, tangents)))
    assert (result.cpu().double() - true).norm() <= 0.02 * true.norm()


def reverse_over_reverse(loss, point: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in point]
    slopes = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    return list(torch.autograd.grad(slopes, leaves, direction))


def reverse_over_forward(loss, point: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in point]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves, direction, strict=True)]
        slope = forward_ad.unpack_dual(loss(*duals)).tangent
    return list(torch.autograd.grad(slope, leaves))


def forward_over_reverse(loss, point: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.clone().requires_grad_(), t) for x, t in zip(point, direction, strict=True)]
        slopes = torch.autograd.grad(loss(*duals), duals)
        return [forward_ad.unpack_dual(slope).tangent for slope in slopes]


def forward_over_forward(loss, point: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
    """Of the first argument: the others take a column of the Hessian for each of their elements."""

    def slope(*x: Tensor) -> Tensor:
        return torch.func.jvp(loss, x, tuple(direction))[1]

    return [torch.func.jacfwd(slope)(*point)]


@pytest.mark.cases([*ONE_OF_EACH[:4], find("na-tiny-shared", bias=True), replace(ONE_OF_EACH[3], score="dot")])
@pytest.mark.parametrize("mode", [reverse_over_forward, forward_over_reverse, forward_over_forward])
def test_reference_in_every_mode_of_differentiation(case, mode):
    """The Hessian times a vector, four ways, of the attention and of its weights."""
    inputs = inputs_of(case)
    point, direction = list(inputs.values()), list(cotangents_of(case, inputs).values())

    def loss(attend):
        return lambda *tensors: attend(dict(zip(inputs, tensors, strict=True))).sin().sum()

    def weights(tensors: Inputs) -> Tensor:
        neighborhood = {"grid": {"window_size": case.window}, "full": {}}.get(
            case.kind, {"kernel_size": case.argument("kernel"), "dilation": case.argument("dilation")}
        )
        query, key, value, table = arguments_of(case, tensors)
        positions = [(2, 1), (0, 3)] if query.dim() == 5 else [4, 0]
        rows = natten_ext.attention_weights(query, key, positions, bias=table, score=case.score, **neighborhood)
        return rows.square().sum() + 0 * value.sum()

    true = reverse_over_reverse(loss(lambda tensors: oracle_forward(case, tensors)), point, direction)
    results = mode(loss(lambda tensors: forward(case, tensors, "reference")), point, direction)
    for result, expected in zip(results, true, strict=False):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)
    true = reverse_over_reverse(loss(weights), point, direction)
    for result, expected in zip(mode(loss(weights), point, direction), true, strict=False):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)
