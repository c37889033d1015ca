"""Derivatives of the operators, in reverse and forward mode, and their rules for ``torch.func.vmap``.

With x the inputs, O the output and the log-sum-exp (``natural_lse``), y a gradient of both, J the derivative of O by x
and H(y) the second derivative of <y, O>:

| operator | gives | reverse mode | forward mode |
| --- | --- | --- | --- |
| forward(x) | O | J^T y = backward(y, x) | J t = double_backward(t, -, x), its first two results |
| backward(y, x) | J^T y | J c, H(y) c = double_backward(c, y, x) | J^T s + H(y) t, with s the tangent of y |
| double_backward(c, y, x) | J c, H(y) c | in c: J^T a + H(y) b; in x, through J c: H(a) c | in c: it is linear |

What is missing takes a third derivative, and raises. docs/double_backward.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .eager import plain
from .geometry import NEIGHBORHOOD
from .orders import BACKWARD, CHOICES, DOUBLE_BACKWARD, FORWARD, INPUTS, ORDERS, Order

_THIRD = (
    "natten_ext: the third derivative of a fused attention is not implemented;"
    ' use backend="reference", which has every order'
)
_THIRD_IN_LEVEL = (
    f"{_THIRD} (a gradient that is taken inside of forward_ad.dual_level() is given its tangent as well: where that is"
    " not wanted, leave the level first)"
)
_FORWARD_OVER_FORWARD = (
    "natten_ext: forward mode over forward mode is not implemented for a fused attention; take reverse mode for one of"
    ' the two, or backend="reference", which has every mix'
)
_requires_grad = attrgetter("requires_grad")
_COUNT = {order: len(order.types) for order in ORDERS}
_OUTGOING = len(DOUBLE_BACKWARD.results) - len(INPUTS)  # the output and the log-sum-exp

# ---------------------------------------------------------------------------------------------- where autograd sees it


class Direct:
    """The operators of a backend in Python, called without torch's dispatcher where they need nothing of it.

    Results that are not asked for are None there.
    """

    def __init__(self, operators: Any, run: Callable) -> None:
        self.operators, self.run = operators, run
        for order in ORDERS:
            setattr(self, order.name, partial(self._call, order))

    def _call(self, order: Order, *arguments: Any) -> tuple[Tensor | None, ...]:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if plain(tensors):
            return _differentiated(order, self, arguments, tensors)
        return getattr(self.operators, order.name)(*arguments)


def differentiated(order: Order, operators: Any, *arguments: Any) -> Any:
    """What an operator does where autograd is to see it.

    Not ``torch.library.register_autograd``, which drops tangents without a word wherever no gradient is recorded.
    """
    return _differentiated(order, operators, arguments, [x for x in arguments if isinstance(x, Tensor)])


def _differentiated(order: Order, operators: Any, arguments: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
    if not ((torch.is_grad_enabled() and any(map(_requires_grad, tensors))) or _any_tangent(tensors)):
        return _below_autograd(operators, order, arguments)
    if order is DOUBLE_BACKWARD:
        cotangents = len(INPUTS)
        arguments = (*arguments, *map(_refuse_third, arguments[cotangents : 2 * cotangents + _OUTGOING]))
    return _apply(_FUNCTIONS[order], operators, *arguments)


def _any_tangent(tensors: Sequence[Tensor]) -> bool:
    # Tangents that are not to be seen belong to an inner level.
    if not torch._C._is_fwd_grad_enabled():
        return False
    # Traced code enters levels without telling `forward_ad`; its tensors are torch.func's, or no plain ones.
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
    if forward_ad._current_level < 0 and plain and not torch._C._are_functorch_transforms_active():
        return False
    return any(torch._VF._unpack_dual(x, level=0)[1] is not None for x in tensors)


def _apply(function: type[_SingleLevelFunction], *arguments: Any) -> Any:
    """One level of differentiation. torch.func, where it is active, calls the operator again for each of its others."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    with enable_single_level_autograd_function():
        return function.apply(*arguments)


def _below_autograd(operators: Any, order: Order, arguments: Sequence[Any]) -> Any:
    if isinstance(operators, Direct):
        return operators.run(order, arguments)
    operator = getattr(operators, order.name)
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)
    # A function's `forward` runs without recording, and torch.func's next level is to record what it sees.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _asked(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _sum(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def _outgoing(of_output: Tensor | None, of_lse: Tensor | None, output: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """What operators take in the place of a gradient of both results; None without either."""
    if of_output is None and of_lse is None:
        return None
    return torch.zeros_like(output) if of_output is None else of_output, of_lse


# ---------------------------------------------------------------------------------------------- derivatives


_OF_LSE = [i for i, name in enumerate(INPUTS) if name != "value"]
"""The inputs that the log-sum-exp depends on."""


def _lse_varies(requires_grad: Sequence[bool], arguments: Sequence[Any]) -> bool:
    """Whether the log-sum-exp has a derivative, by what a function's ``forward`` is told."""
    if any(requires_grad[i] for i in _OF_LSE):
        return True
    with forward_ad._set_fwd_grad_enabled(True):  # tangents are not seen there otherwise
        return _any_tangent([arguments[i] for i in _OF_LSE if arguments[i] is not None])


class _Forward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, operators, *arguments):
        output, lse, natural_lse = _below_autograd(operators, FORWARD, arguments)
        _save(ctx, operators, *arguments[: len(INPUTS)], output, lse)
        *ctx.choices, return_lse = arguments[len(INPUTS) :]
        ctx.lse_varies = return_lse and _lse_varies(ctx.needs_input_grad[1:], arguments)
        ctx.mark_non_differentiable(lse, *[] if ctx.lse_varies or natural_lse is None else [natural_lse])
        return output, lse, natural_lse

    @staticmethod
    def backward(ctx, grad_output, _grad_lse_in_parts, grad_lse):
        *inputs, output, lse = ctx.saved_tensors
        # `output` is a function of the other inputs, and its share in the second derivative in the formulas already.
        # Without the detach autograd would run hooks on `output` with the gradient None.
        output = output.detach()
        outgoing = _outgoing(grad_output, grad_lse, output)
        if outgoing is None:
            return (None,) * (1 + _COUNT[FORWARD])
        query, key, value, bias = inputs
        if grad_output is None:
            # The log-sum-exp does not depend on values: zero times NaN must not tell otherwise.
            value, output = torch.zeros_like(value), torch.zeros_like(output)
        needs = list(ctx.needs_input_grad[1 : 1 + len(INPUTS)])
        grads = ctx.operators.backward(*outgoing, query, key, value, bias, output, lse, *ctx.choices, needs)
        return None, *_asked(grads, needs), *(None,) * (_COUNT[FORWARD] - len(INPUTS))

    @staticmethod
    def jvp(ctx, _operators, *tangents):
        *inputs, output, lse = ctx.saved_tensors
        output = output.detach()
        needs = [True, ctx.lse_varies] + [False] * len(INPUTS)
        of_inputs = tangents[: len(INPUTS)]
        # Of any grad_output: J t does not depend on it.
        results = ctx.operators.double_backward(*of_inputs, output, None, *inputs, output, lse, *ctx.choices, needs)
        return results[0], None, results[1] if ctx.lse_varies else None


class _Backward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, operators, *arguments):
        count = _COUNT[BACKWARD] - len(CHOICES) - 1
        _save(ctx, operators, *arguments[:count])
        ctx.choices, ctx.needs = arguments[count:-1], arguments[-1]
        return _below_autograd(operators, BACKWARD, arguments)

    @staticmethod
    def backward(ctx, *cotangents):
        # Gradients that were not asked for are empty; autograd may materialise cotangents for them.
        cotangents = _asked(cotangents, ctx.needs)
        if all(c is None for c in cotangents):
            return (None,) * (1 + _COUNT[BACKWARD])
        needs = list(ctx.needs_input_grad[1 : 1 + _OUTGOING + len(INPUTS)])
        grads = ctx.operators.double_backward(*cotangents, *ctx.saved_tensors, *ctx.choices, needs)
        return None, *_asked(grads, needs), *(None,) * (_COUNT[BACKWARD] - len(needs))

    @staticmethod
    def jvp(ctx, _operators, of_grad_output, of_grad_lse, *tangents):
        # Those of output and lse, functions of the inputs, are in the formulas.
        of_inputs = tangents[: len(INPUTS)]
        grad_output, rest = ctx.saved_tensors[0], ctx.saved_tensors[_OUTGOING:]
        terms = []
        if any(t is not None for t in of_inputs):
            needs = [False] * _OUTGOING + [*ctx.needs]
            grads = ctx.operators.double_backward(*of_inputs, *ctx.saved_tensors, *ctx.choices, needs)
            terms.append(grads[_OUTGOING:])
        if outgoing := _outgoing(of_grad_output, of_grad_lse, grad_output):
            terms.append(ctx.operators.backward(*outgoing, *rest, *ctx.choices, ctx.needs))
        return tuple(map(_sum, *terms)) if terms else (None,) * len(INPUTS)


class _DoubleBackward(_SingleLevelFunction):
    """Its arguments end with the outgoing gradients and the inputs once more, from ``_refuse_third``."""

    @staticmethod
    def forward(ctx, operators, *arguments):
        arguments = arguments[: _COUNT[DOUBLE_BACKWARD]]
        count = len(arguments) - len(CHOICES) - 1
        _save(ctx, operators, *arguments[:count])
        ctx.choices, ctx.needs = arguments[count:-1], arguments[-1]
        return _below_autograd(operators, DOUBLE_BACKWARD, arguments)

    @staticmethod
    def backward(ctx, *cotangents):
        inputs, both = len(INPUTS), len(INPUTS) + _OUTGOING
        of_output, of_lse, *second = _asked(cotangents, ctx.needs)
        cots, outgoing, rest = ctx.saved_tensors[:inputs], ctx.saved_tensors[inputs:both], ctx.saved_tensors[both:]
        first = _outgoing(of_output, of_lse, outgoing[0])
        need_cots = list(ctx.needs_input_grad[1 : 1 + inputs])
        need_inputs = list(ctx.needs_input_grad[1 + both : 1 + both + inputs])
        no_outgoing = [False] * _OUTGOING
        backward, double_backward = ctx.operators.backward, ctx.operators.double_backward
        by_first = by_second = of_inputs = [None] * inputs
        if first is not None and any(need_cots):
            by_first = _asked(backward(*first, *rest, *ctx.choices, need_cots), need_cots)
        if first is not None and any(need_inputs):
            grads = double_backward(*cots, *first, *rest, *ctx.choices, [*no_outgoing, *need_inputs])
            of_inputs = _asked(grads[_OUTGOING:], need_inputs)
        third = [None] * both
        if any(c is not None for c in second):
            if any(need_cots):
                grads = double_backward(*second, *outgoing, *rest, *ctx.choices, [*no_outgoing, *need_cots])
                by_second = _asked(grads[_OUTGOING:], need_cots)
            third = [None if x is None else torch.zeros_like(x) for x in (*outgoing, *rest[:inputs])]
        of_cots = map(_sum, by_first, by_second)
        others = (None,) * (_COUNT[DOUBLE_BACKWARD] - 2 * inputs - _OUTGOING)
        return None, *of_cots, *(None,) * _OUTGOING, *of_inputs, *others, *third

    @staticmethod
    def jvp(ctx, _operators, *tangents):
        inputs = len(INPUTS)
        of_cots, of_others = tangents[:inputs], tangents[inputs : 2 * inputs + _OUTGOING]
        if any(t is not None for t in of_others):
            raise RuntimeError(_THIRD_IN_LEVEL if any(ctx.needs[_OUTGOING:]) else _FORWARD_OVER_FORWARD)
        return ctx.operators.double_backward(*of_cots, *ctx.saved_tensors[inputs:], *ctx.choices, ctx.needs)


class _RefuseThird(_SingleLevelFunction):
    """The same tensor, which raises where a gradient comes to it that would be a third derivative."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.set_materialize_grads(False)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        if gradient is not None:
            raise RuntimeError(_THIRD)

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.view_as(tangent)


def _refuse_third(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _apply(_RefuseThird, tensor)


def _save(ctx, operators: Any, *tensors: Tensor | None) -> None:
    ctx.operators = operators
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


_FUNCTIONS = {FORWARD: _Forward, BACKWARD: _Backward, DOUBLE_BACKWARD: _DoubleBackward}

# ---------------------------------------------------------------------------------------------- vmap


def _vmap_over_nothing(operator, operands, dims, given):
    """Empty results of the right shapes: kernels know a batch of zero, not zero heads."""

    def one(name: str, operand: Any) -> Any:
        mapped = isinstance(operand, Tensor) and dims[name] is not None
        return operand.new_zeros(operand.movedim(dims[name], 0).shape[1:]) if mapped else operand

    results = operator(*(one(name, operand) for name, operand in operands._asdict().items()))
    empty = tuple(r.new_empty((0, *r.shape)) if need else r for r, need in zip(results, given, strict=True))
    return empty, tuple(0 if need else None for need in given)


def vmap_rule(order: Order, operator: Callable) -> Callable:
    """The new dimension becomes part of the batch, or of the heads where there is a table for each of its entries."""
    names = list(order.types)

    def rule(info, in_dims, *arguments):
        operands = order.operands(*arguments)
        given = order.asked(operands)
        dims = dict(zip(names, in_dims, strict=True))
        if info.batch_size == 0:
            return _vmap_over_nothing(operator, operands, dims, given)
        tables = [d for name, d in dims.items() if name.endswith("bias")]
        tables += [need or None for name, need in zip(order.results, given, strict=True) if name.endswith("bias")]
        by_heads = any(d is not None for d in tables)

        def place(name: str, rank: int) -> int:
            """Where the new dimension lies, in a tensor that has it: before the batch or the heads."""
            if name.endswith("lse"):
                return (name == "lse") + by_heads
            return rank - 3 if by_heads and not name.endswith("bias") else 0

        def folded(name: str, operand: Any) -> Any:
            if not isinstance(operand, Tensor) or (name.endswith("bias") and not by_heads):
                return operand
            dim = dims[name]
            if dim is None:
                at = place(name, operand.dim() + 1)
                operand = operand.unsqueeze(at).expand(*operand.shape[:at], info.batch_size, *operand.shape[at:])
            else:
                at = place(name, operand.dim())
                operand = operand.movedim(dim, at)
            operand = operand.flatten(at, at + 1)
            return operand.contiguous() if name == "lse" else operand

        neighborhood = operands.neighborhood
        if by_heads and neighborhood[0] == NEIGHBORHOOD:
            neighborhood = [NEIGHBORHOOD, *neighborhood[1:] * info.batch_size]
        values = {name: folded(name, operand) for name, operand in zip(names, operands, strict=True)}
        results, out_dims = [], []
        for name, need, result in zip(
            order.results, given, operator(*(values | {"neighborhood": neighborhood}).values()), strict=True
        ):
            at = place(name, result.dim() + 1) if need else None
            if need:
                result = result.unflatten(at, (info.batch_size, result.shape[at] // info.batch_size))
            results.append(result)
            out_dims.append(at)
        return tuple(results), tuple(out_dims)

    return rule
