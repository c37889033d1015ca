"""Third derivatives: fused backends refuse what they lack; ``reference`` has them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.operators.cases import (
    ONE_OF_EACH,
    Inputs,
    cotangents_of,
    forward,
    grad_output_of,
    inputs_of,
    on,
    oracle_forward,
)

pytestmark = pytest.mark.samples(interpreted=0)


def second_derivatives(attend, inputs: Inputs, y: Tensor, cotangents: Inputs) -> tuple[Inputs, Inputs]:
    """Second derivatives with a graph, and everything that they depend on."""
    leaves, y = {n: t.clone().requires_grad_() for n, t in inputs.items()}, y.clone().requires_grad_()
    given = {n: t.clone().requires_grad_() for n, t in cotangents.items()}
    first = torch.autograd.grad(attend(leaves), list(leaves.values()), y, create_graph=True)
    sources = leaves | {"grad_output": y}
    second = torch.autograd.grad(first, list(sources.values()), list(given.values()), create_graph=True)
    return dict(zip(sources, second, strict=True)), sources | {f"cot_{n}": t for n, t in given.items()}


@pytest.mark.cases(ONE_OF_EACH)
def test_a_third_derivative_raises(target, case):
    """And `allow_unused` does not turn it into None. What is linear in cotangents has its derivative: see the next."""
    inputs = inputs_of(case, torch.float32, target.device)
    y, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    second, sources = second_derivatives(lambda x: forward(case, x, target.backend), inputs, y, cotangents)
    for name, result in second.items():
        if name == "grad_output":
            continue
        for source in (sources[n] for n in sources if not n.startswith("cot")):
            with pytest.raises(RuntimeError, match="third"):
                torch.autograd.grad(result.square().sum(), source, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="third"):
        sum(result.square().sum() for result in second.values()).backward()


def check_what_the_third_order_has(target, attend, true, inputs: Inputs, y: Tensor, cotangents: Inputs) -> None:
    def third(second: Inputs, sources: Inputs) -> list[Tensor]:
        linear = [t for n, t in sources.items() if n.startswith("cot")]
        of_all = torch.autograd.grad(sum(x.sin().sum() for x in second.values()), linear, retain_graph=True)
        slope = second["grad_output"].sin().sum()
        return [*of_all, *torch.autograd.grad(slope, list(sources.values()), materialize_grads=True)]

    there = on(target, inputs), y.to(target.device), on(target, cotangents)
    result = third(*second_derivatives(attend, *there))
    for one, other in zip(result, third(*second_derivatives(true, inputs, y, cotangents)), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-11, atol=1e-11)


@pytest.mark.cases(ONE_OF_EACH)
def test_what_the_third_order_has(target, case):
    """Second derivatives are linear in cotangents; that of the incoming gradient is a derivative of the output."""
    target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    y, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    attends = (lambda x: forward(case, x, target.backend)), (lambda x: oracle_forward(case, x))
    check_what_the_third_order_has(target, *attends, inputs, y, cotangents)


@pytest.mark.cases(ONE_OF_EACH[1:3])
def test_reference_has_a_third_derivative(case):
    def third(attend) -> list[Tensor]:
        leaves = {n: t.requires_grad_() for n, t in inputs_of(case).items()}
        value = attend(leaves).sin().sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
            value = sum(grad.sin().sum() for grad in grads)
        return list(grads)

    result = third(lambda leaves: forward(case, leaves, "reference"))
    for one, other in zip(result, third(lambda leaves: oracle_forward(case, leaves)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
