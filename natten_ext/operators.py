"""The operators of the fused backends, ``natten_ext_<backend>::<order>``, chained by autograd.

Declared here for all backends from ``natten_ext.orders``, with what they have in common: results without data,
derivatives and rules of vmap. The work is done by what a backend registers: in C++ (csrc/cpu/library.cpp), or its
function ``run``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .backends.choice import FUSED
from .backends.support import namespace
from .derivatives import Direct, differentiated, vmap_rule
from .orders import INPUTS, ORDERS, Order, accumulation_dtype

OPERATORS = {backend: getattr(torch.ops, namespace(backend)) for backend in FUSED}
"""By backend, the operators as attributes."""

CALLS = {
    backend: operators if FUSED[backend].run is None else Direct(operators, FUSED[backend].run)
    for backend, operators in OPERATORS.items()
}
"""The same, called directly where that makes no difference but time."""

# ---------------------------------------------------------------------------------------------- results without data


def _fake(order: Order, *arguments: Any) -> tuple[torch.Tensor, ...]:
    operands = order.operands(*arguments)
    # A call with some meta tensors comes here, and results hold nothing.
    devices = {operand.device for operand in operands if isinstance(operand, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(f"operands must be on one device, got {', '.join(sorted(map(str, devices)))}")
    query = operands.query
    batch, *tokens, heads, _ = query.shape
    lse = query.new_empty((2, batch, heads, *tokens), dtype=accumulation_dtype(query.dtype))
    like = {"output": query, "lse": lse, "natural_lse": lse[0], "grad_grad_output": query, "grad_grad_lse": lse[0]}
    like |= {f"grad_{name}": getattr(operands, name) for name in INPUTS}
    pairs = zip((like[name] for name in order.results), order.asked(operands), strict=True)
    return tuple(x.new_empty(x.shape) if need else query.new_empty((0,)) for x, need in pairs)


# ---------------------------------------------------------------------------------------------- declarations


def _run(order: Order, run: Callable, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """An operator's results are tensors: where one is not asked for, empty, and each its own."""
    query = order.checked(arguments).query
    results = run(order, arguments)
    return tuple([query.new_empty((0,)) if result is None else result for result in results])


def _declare(backend: str, order: Order) -> None:
    name = f"{namespace(backend)}::{order.name}"
    torch.library.define(name, order.schema())
    torch.library.register_fake(name, partial(_fake, order))
    torch.library.impl(name, "Autograd")(partial(differentiated, order, OPERATORS[backend]))
    torch.library.register_vmap(name, vmap_rule(order, getattr(OPERATORS[backend], order.name)))
    run = FUSED[backend].run
    if run is not None:
        torch.library.impl(name, "CompositeExplicitAutograd")(partial(_run, order, run))


for _backend in FUSED:
    for _order in ORDERS:
        _declare(_backend, _order)
