"""Inputs of a shape and the steps that are timed, checked and measured: one for each order of differentiation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.autograd import forward_ad

from .shapes import Shape

ORDERS = ("forward", "backward", "double", "tangent")

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""``(query, key, value, table) -> output`` in natten_ext's layout: heads and channels are the last dimensions."""


class CannotError(Exception):
    """A candidate can't do a shape or an order; the message is the reason."""


@dataclass
class Inputs:
    """Leaves of the graph. ``weight`` multiplies the output: the gradient that comes down from the layers above."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor | None
    weight: torch.Tensor

    @property
    def features(self) -> dict[str, torch.Tensor]:
        """Query, key and value; one entry for both query and key where they are tied."""
        if self.query is self.key:
            return {"query": self.query, "value": self.value}
        return {"query": self.query, "key": self.key, "value": self.value}

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        table = {} if self.table is None else {"table": self.table}
        return {**self.features, **table}

    def detached(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Query, key, value and table without a graph (some libraries refuse leaves even under ``no_grad``)."""
        query, key, value = (x.detach() for x in (self.query, self.key, self.value))
        return query, key, value, None if self.table is None else self.table.detach()

    @property
    def tangents(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Of query, key, value and table, in forward mode: other inputs, which are as random and take no memory."""
        _, key, value, table = self.detached()
        weight = self.weight.detach()
        return weight, weight if self.key is self.query else value, key, table

    def untied(self) -> Inputs:
        """The same with a key of its own where query and key are one tensor."""
        return replace(self, key=self.query.detach().clone().requires_grad_()) if self.key is self.query else self

    def without_table(self) -> Inputs:
        return replace(self, table=None)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Normal random leaves, the same for every candidate; the spread keeps softmax away from one-hot rows."""
    generator = torch.Generator(device).manual_seed(seed)

    def leaf(size: tuple[int, ...], spread: float = 1.0) -> torch.Tensor:
        values = torch.randn(size, generator=generator, device=device) * spread
        return values.to(dtype).requires_grad_()

    spread = 0.5 if shape.score == "l2" else 1.0
    query = leaf(shape.query_shape, spread)
    key = query if shape.tied else leaf(shape.key_shape, spread)
    value, weight = leaf(shape.key_shape), leaf(shape.query_shape)
    table = leaf(shape.table_shape) if shape.table else None
    return Inputs(query, key, value, table, weight)


def forward_step(attend: Attend, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The output, without a graph (as in sampling from a generator)."""
    return {"output": attend(*inputs.detached())}


def backward_step(attend: Attend, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Forward and backward: the output and the gradients of every leaf."""
    output = attend(inputs.query, inputs.key, inputs.value, inputs.table)
    grads = first_gradients(output, inputs.leaves, inputs, create_graph=False)
    return {"output": output.detach()} | {f"grad_{name}": grad for name, grad in grads.items()}


def double_step(attend: Attend, inputs: Inputs) -> dict[str, torch.Tensor]:
    """A gradient-penalty step: forward, backward with a graph, and the backward of the sum of the squared gradients.

    The penalty is on the gradients of query, key and value (in a discriminator it is on the image, which all three
    come from). Its gradient is taken for every leaf, the table and the incoming gradient ``weight`` included.
    """
    output = attend(inputs.query, inputs.key, inputs.value, inputs.table)
    first = first_gradients(output, inputs.features, inputs, create_graph=True)
    penalty = sum(grad.square().sum() for grad in first.values())
    leaves = {**inputs.leaves, "weight": inputs.weight}
    second = torch.autograd.grad(penalty, list(leaves.values()), allow_unused=True)
    missing = [name for name, grad in zip(leaves, second, strict=True) if grad is None]
    if missing:
        raise CannotError(f"second derivative silently missing for {', '.join(missing)}")
    results = {f"grad_{name}": grad.detach() for name, grad in first.items()}
    return results | {f"penalty_{name}": grad for name, grad in zip(leaves, second, strict=True)}


def tangent_step(attend: Attend, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Forward mode: the output and its tangent along tangents of every input."""
    with torch.no_grad(), forward_ad.dual_level():
        pairs = zip(inputs.detached(), inputs.tangents, strict=True)
        dual = attend(*(None if x is None else forward_ad.make_dual(x, tangent) for x, tangent in pairs))
        output, tangent = forward_ad.unpack_dual(dual)
    if tangent is None:
        raise CannotError("tangent silently missing")
    return {"output": output, "tangent": tangent}


STEPS = {"forward": forward_step, "backward": backward_step, "double": double_step, "tangent": tangent_step}


def operator_alone(attend: Attend, inputs: Inputs, order: str) -> Callable[[], object]:
    """A call of one order's operator alone: the forward, the backward, the double backward, or the tangent.

    What it needs of the orders before it is made here and kept. The double backward takes all first gradients'
    cotangents.
    """
    if order == "forward":
        return lambda: attend(*inputs.detached())
    if order == "tangent":
        return _tangent_alone(attend, inputs)
    inputs = inputs.untied()
    output = attend(inputs.query, inputs.key, inputs.value, inputs.table)
    if order == "backward":
        leaves, weight = list(inputs.leaves.values()), inputs.weight.detach()
        return lambda: torch.autograd.grad(output, leaves, weight, retain_graph=True)
    first = first_gradients(output, inputs.features, inputs, create_graph=True)
    cotangents = [2 * grad.detach() for grad in first.values()]
    leaves = [*inputs.leaves.values(), inputs.weight]
    return lambda: torch.autograd.grad(list(first.values()), leaves, cotangents, retain_graph=True)


def _tangent_alone(attend: Attend, inputs: Inputs) -> Callable[[], object]:
    given = [(x, tangent) for x, tangent in zip(inputs.detached(), inputs.tangents, strict=True) if x is not None]
    points, tangents = zip(*given, strict=True)

    def output(query, key, value, table=None):
        return attend(query, key, value, table)

    _, tangent_of = torch.func.linearize(output, *points)
    return lambda: tangent_of(*tangents)


def first_gradients(
    output: torch.Tensor, leaves: dict[str, torch.Tensor], inputs: Inputs, create_graph: bool
) -> dict[str, torch.Tensor]:
    """Gradients of ``sum(output * weight)``; CannotError where they come back without the graph that was asked for."""
    if not output.requires_grad:
        raise CannotError("no gradient: the output is detached from its inputs")
    weight = inputs.weight if create_graph else inputs.weight.detach()
    grads = torch.autograd.grad(output, list(leaves.values()), weight, create_graph=create_graph)
    if create_graph:
        detached = [name for name, grad in zip(leaves, grads, strict=True) if not grad.requires_grad]
        if detached:
            raise CannotError(f"second derivative silently missing: gradients of {', '.join(detached)} are detached")
    return dict(zip(leaves, grads, strict=True))
