"""``torch.func``, dual numbers and batched gradients: right, or an error that names the backend that can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import natten_ext
from tests.operators.cases import find, forward, inputs_of


def jvp_by_dual_numbers(function, query: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(query, tangent)))
        return torch.zeros_like(query) if dual.tangent is None else dual.tangent


def batched_gradients(function, query: Tensor, stack: Tensor) -> Tensor:
    query = query.clone().requires_grad_()
    return torch.autograd.grad(function(query), query, stack, is_grads_batched=True)[0]


TRANSFORMS = {
    "func.grad": lambda f, query, stack: torch.func.grad(lambda q: f(q).square().sum())(query),
    "func.vjp": lambda f, query, stack: torch.func.vjp(f, query)[1](stack[1])[0],
    "func.vmap": lambda f, query, stack: torch.func.vmap(f)(stack),
    "func.jvp": lambda f, query, stack: torch.func.jvp(f, (query,), (stack[1],))[1],
    "func.hessian": lambda f, query, stack: torch.func.hessian(lambda q: f(q)[0, 0].square().sum())(query),
    "dual numbers": lambda f, query, stack: jvp_by_dual_numbers(f, query, stack[1]),
    "dual numbers of a leaf": lambda f, query, stack: jvp_by_dual_numbers(f, query.requires_grad_(), stack[1]),
    "batched gradients": batched_gradients,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_work_or_say_that_they_do_not(target, name):
    """Right or an error; never a silent zero."""
    target.skip_unless_can(torch.float64)
    inputs = inputs_of(find("full-self-9"), torch.float64, target.device)
    query, rest = inputs["query"], {n: t for n, t in inputs.items() if n != "query"}
    stack = torch.stack([query, query.flip(1)])

    def attend(backend: str):
        return lambda q: forward(find("full-self-9"), rest | {"query": q}, backend)

    expected = TRANSFORMS[name](attend("reference"), query.clone(), stack)
    try:
        result = TRANSFORMS[name](attend(target.backend), query.clone(), stack)
    except (RuntimeError, NotImplementedError) as error:
        assert str(error)
    else:
        torch.testing.assert_close(result.detach(), expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["func.grad", "func.vjp", "func.jvp", "func.hessian", "dual numbers"])
def test_transforms_that_cannot_be_name_the_backend_that_can(target, name):
    target.skip_unless_can(torch.float64)
    query = torch.randn(1, 4, 2, 8, dtype=torch.float64, device=target.device)
    with pytest.raises(RuntimeError, match=r'natten_ext.*backend="reference"'):
        TRANSFORMS[name](
            lambda q: natten_ext.attention(q, query, query, backend=target.backend), query, torch.stack([query, query])
        )


def test_autograd_through_vmap(target):
    target.skip_unless_can(torch.float64)
    stack = torch.randn(2, 1, 4, 2, 8, dtype=torch.float64, device=target.device)

    def penalty(function) -> Tensor:
        query = stack.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(query).square().sum(), query, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), query)[0]

    def attend(q: Tensor) -> Tensor:
        return natten_ext.attention(q, stack[0], stack[1], backend=target.backend)

    expected = penalty(lambda query: torch.stack([attend(q) for q in query]))
    torch.testing.assert_close(penalty(torch.func.vmap(attend)), expected, rtol=1e-10, atol=1e-10)
