"""The operators of the fused backends, ``natten_ext_<backend>::<order>``, chained by autograd.

Declared here for all backends from ``natten_ext.orders``, with what they have in common: results without data and
derivatives. The work is done by what a backend registers: in C++ (csrc/cpu/library.cpp), or its function ``run``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad

from .backends.choice import FUSED
from .orders import BACKWARD, CHOICES, DOUBLE_BACKWARD, FORWARD, INPUTS, ORDERS, Order

OPERATORS = {backend: getattr(torch.ops, f"natten_ext_{backend}") for backend in FUSED}
"""By backend, the operators as attributes."""

# ---------------------------------------------------------------------------------------------- results without data


def _fake(order: Order, *arguments: Any) -> tuple[torch.Tensor, ...]:
    operands = order.operands(*arguments)
    # A call with some meta tensors comes here, and results hold nothing.
    devices = {operand.device for operand in operands if isinstance(operand, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(f"operands must be on one device, got {', '.join(sorted(map(str, devices)))}")
    query = operands.query
    if order is FORWARD:
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        batch, *tokens, heads, _ = query.shape
        return query.new_empty(query.shape), query.new_empty((2, batch, heads, *tokens), dtype=lse_dtype)
    of = [getattr(operands, result.removeprefix("grad_")) for result in order.results]
    pairs = zip(of, operands.needs, strict=True)
    return tuple(x.new_empty(x.shape) if need else query.new_empty((0,)) for x, need in pairs)


# ---------------------------------------------------------------------------------------------- derivatives


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, *arguments):
        output, lse = _below_autograd(operators.forward, arguments)
        ctx.save_for_backward(*arguments[: len(INPUTS)], output, lse)
        ctx.operators, ctx.choices = operators, arguments[len(INPUTS) :]
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, _grad_lse):
        if grad_output is None:
            return (None,) * (1 + len(FORWARD.types))
        *inputs, output, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1 : 1 + len(INPUTS)])
        # `output` is a function of the other inputs, and its share in the second derivative in the formulas already.
        # Without the detach autograd would run hooks on `output` with the gradient None.
        grads = ctx.operators.backward(grad_output, *inputs, output.detach(), lse, *ctx.choices, needs)
        return None, *_asked(grads, needs), *(None,) * len(CHOICES)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, *arguments):
        count = len(BACKWARD.types) - len(CHOICES) - 1
        ctx.save_for_backward(*arguments[:count])
        ctx.operators, ctx.choices, ctx.needs = operators, arguments[count:-1], arguments[-1]
        ctx.set_materialize_grads(False)
        return _below_autograd(operators.backward, arguments)

    @staticmethod
    def backward(ctx, *cotangents):
        # Gradients that were not asked for are empty; autograd may materialise cotangents for them.
        cotangents = _asked(cotangents, ctx.needs)
        if all(c is None for c in cotangents):
            return (None,) * (1 + len(BACKWARD.types))
        needs = list(ctx.needs_input_grad[1 : 2 + len(INPUTS)])
        grads = ctx.operators.double_backward(*cotangents, *ctx.saved_tensors, *ctx.choices, needs)
        return None, *_asked(grads, needs), *(None,) * (len(BACKWARD.types) - len(needs))


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, *arguments):
        return _below_autograd(operators.double_backward, arguments)

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError(
            "natten_ext: the third derivative of a fused attention is not implemented;"
            ' use backend="reference", which has every order'
        )


_DERIVATIVES = {FORWARD: _Forward, BACKWARD: _Backward, DOUBLE_BACKWARD: _DoubleBackward}


def _asked(grads, needs):
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _below_autograd(operator, arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _differentiable(order: Order, operators: Any) -> Callable:
    """What an operator does where autograd is to see it.

    Not ``torch.library.register_autograd``, which drops tangents without a word wherever no gradient is recorded.
    """
    operator, function = getattr(operators, order.name), _DERIVATIVES[order]

    def differentiable(*arguments):
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(
                "natten_ext: forward-mode derivatives of a fused attention are not implemented;"
                ' use backend="reference", which has them'
            )
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            # Inside torch.func.grad or vjp, where torch can't differentiate an operator whose derivative is in Python.
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    "natten_ext: torch.func can't differentiate a fused attention; use torch.autograd.grad,"
                    ' or backend="reference", which every transform can'
                )
            return function.apply(operators, *arguments)
        return _below_autograd(operator, arguments)

    return differentiable


# ---------------------------------------------------------------------------------------------- declarations


def _declare(backend: str, order: Order) -> None:
    name = f"natten_ext_{backend}::{order.name}"
    torch.library.define(name, order.schema())
    torch.library.register_fake(name, partial(_fake, order))
    torch.library.impl(name, "Autograd")(_differentiable(order, OPERATORS[backend]))
    run = FUSED[backend].run
    if run is not None:
        torch.library.impl(name, "CompositeExplicitAutograd")(lambda *arguments: run(order, order.checked(arguments)))


for _backend in FUSED:
    for _order in ORDERS:
        _declare(_backend, _order)
