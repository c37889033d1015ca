"""Forward-mode derivatives: fused backends refuse a tangent anywhere; ``reference`` mixes all modes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import natten_ext
from natten_ext import geometry
from natten_ext.operators import OPERATORS
from tests.operators.cases import (
    ONE_OF_EACH,
    Inputs,
    arguments_of,
    cotangents_of,
    forward,
    grad_output_of,
    inputs_of,
    oracle_forward,
)

OPERANDS = ["query", "key", "value", "bias", "grad_output", "cot_query", "cot_key", "cot_value", "cot_bias"]


@pytest.mark.cases(ONE_OF_EACH[1:3])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "not-recorded"])
@pytest.mark.parametrize("name", OPERANDS)
def test_a_tangent_anywhere_raises(target, case, name, recorded):
    """In every operand of every order, whether or not a gradient of the result is recorded."""
    inputs = inputs_of(case, torch.float32, target.device)
    leaves = {n: t.requires_grad_(recorded or name.startswith(("grad", "cot"))) for n, t in inputs.items()}
    given = {"grad_output": grad_output_of(case, inputs["query"].detach())}
    given |= {f"cot_{n}": t for n, t in cotangents_of(case, inputs).items()}

    def derivatives_with_a_tangent() -> None:
        operands = leaves | given
        operands[name] = forward_ad.make_dual(operands[name], torch.ones_like(operands[name]))
        output = forward(case, {n: operands[n] for n in leaves}, target.backend)
        more = recorded or name.startswith("cot")
        first = torch.autograd.grad(output, list(leaves.values()), operands["grad_output"], create_graph=more)
        cotangents = [operands[f"cot_{n}"] for n in leaves]
        torch.autograd.grad(first, list(leaves.values()), cotangents, create_graph=recorded)

    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivatives"):
        derivatives_with_a_tangent()


@pytest.mark.cases(ONE_OF_EACH[1:2])
def test_a_tangent_in_a_direct_call_of_an_operator_raises(target, case):
    """Operators, not only the functions, refuse tangents: no gradient is recorded here."""
    inputs = inputs_of(case, torch.float32, target.device)
    choices = [geometry.Grid(case.window).encode(), case.score == "l2", 0.5]
    needs, operators = [True] * 4, OPERATORS[target.backend]
    output, lse = operators.forward(*inputs.values(), *choices)
    arguments = {
        "forward": [*inputs.values(), *choices],
        "backward": [output, *inputs.values(), output, lse, *choices, needs],
        "double_backward": [
            *inputs.values(), output, *inputs.values(), output, lse, *choices, [True, *needs]
        ],
    }  # fmt: skip
    for name, given in arguments.items():
        for position, argument in enumerate(given):
            if not isinstance(argument, Tensor):
                continue
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(argument, torch.ones_like(argument))
                with pytest.raises(RuntimeError, match="forward-mode derivatives"):
                    getattr(operators, name)(*given[:position], dual, *given[position + 1 :])


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


@pytest.mark.cases([*ONE_OF_EACH, replace(ONE_OF_EACH[3], score="dot")])
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
