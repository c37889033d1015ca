"""Third derivatives: fused backends refuse them, whatever is asked for; ``reference`` has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.operators.cases import (
    ONE_OF_EACH,
    Case,
    Inputs,
    cotangents_of,
    forward,
    grad_output_of,
    inputs_of,
    oracle_forward,
)


def second_derivatives(case: Case, target, leaves: Inputs) -> tuple[Inputs, list[Tensor]]:
    """Second derivatives with a graph, and everything that they depend on."""
    grad_output = grad_output_of(case, leaves["query"].detach()).requires_grad_()
    cotangents = {n: t.requires_grad_() for n, t in cotangents_of(case, leaves).items()}
    output = forward(case, leaves, target.backend)
    first = torch.autograd.grad(output, list(leaves.values()), grad_output, create_graph=True)
    names = [*leaves, "grad_output"]
    second = torch.autograd.grad(
        first, [*leaves.values(), grad_output], [cotangents[name] for name in leaves], create_graph=True
    )
    sources = [*leaves.values(), grad_output, *cotangents.values()]
    return dict(zip(names, second, strict=True)), sources


@pytest.mark.cases(ONE_OF_EACH)
def test_a_third_derivative_raises(target, case):
    """Whatever is differentiated with respect to whatever, and `allow_unused` does not turn it into None."""
    leaves = {n: t.requires_grad_() for n, t in inputs_of(case, torch.float32, target.device).items()}
    second, sources = second_derivatives(case, target, leaves)
    for result in second.values():
        for source in sources:
            with pytest.raises(RuntimeError, match="third"):
                torch.autograd.grad(result.square().sum(), source, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="third"):
        sum(result.square().sum() for result in second.values()).backward()


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
