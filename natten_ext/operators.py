"""The three operators behind every fused backend, chained by autograd: forward, backward, double backward.

Tensors are sequences ``(batch, tokens, heads, head_dim)`` or maps ``(batch, height, width, heads, head_dim)``.
``neighborhood`` is the integer code of ``natten_ext.geometry``; ``backend`` names a fused backend. The formulas are
in docs/double_backward.md. What ``needs`` does not ask for comes back as an empty tensor.

``lse`` is each row's log-sum-exp in two parts ``(2, batch, heads, *tokens)``, in the units of the kernels: the score,
times log2(e), from which weights were counted (``base``, about the largest), and log2 of the sum of those weights
(``log_sum``). Added up they would round: scores of 1e5 would leave float32 weights two digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch.autograd import forward_ad

from .backends.choice import FUSED
from .checks import check_score

_COMMON = "Tensor query, Tensor key, Tensor value, Tensor? bias"
_CHOICES = "int[] neighborhood, str score, float scale"

torch.library.define(
    "natten_ext::attention",
    f"({_COMMON}, {_CHOICES}, str backend) -> (Tensor output, Tensor lse)",
)
torch.library.define(
    "natten_ext::attention_backward",
    f"(Tensor grad_output, {_COMMON}, Tensor output, Tensor lse, {_CHOICES}, bool[] needs, str backend)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
)
torch.library.define(
    "natten_ext::attention_double_backward",
    f"(Tensor? cot_query, Tensor? cot_key, Tensor? cot_value, Tensor? cot_bias, Tensor grad_output, {_COMMON},"
    f" Tensor output, Tensor lse, {_CHOICES}, bool[] needs, str backend)"
    " -> (Tensor grad_grad_output, Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
)


def _dense_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Kernels want contiguous channels; anything else (say an expanded gradient) is copied."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    if tensor.numel() == 0:  # counts as contiguous with any strides
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return tensor.contiguous()


def _check_devices(*tensors: torch.Tensor | None) -> None:
    """A call with some meta tensors comes to the fake kernels, whose results hold nothing."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"operands must be on one device, got {', '.join(sorted(map(str, devices)))}")


def _implementation(
    backend: str, score: str, tensors: Sequence[torch.Tensor | None], needs: Sequence[bool] = (), count: int = 0
) -> ModuleType:
    """The backend's module. It checks how tensors and neighborhood fit; these are the other arguments' rules."""
    if any(tensor is None for tensor in tensors):  # torch lets None through
        raise TypeError("query, key, value, grad_output, output and lse must be tensors, got None")
    if backend not in FUSED:
        raise ValueError(f"backend must be one of {tuple(FUSED)}, got {backend!r}")
    check_score(score)
    if len(needs) != count:
        raise ValueError(f"needs must have {count} entries, one per gradient, got {len(needs)}")
    return FUSED[backend]


def _register_autograd(name: str, function: type[torch.autograd.Function]) -> None:
    """Make ``function`` the derivative of an operator.

    Not ``torch.library.register_autograd``, which drops tangents without a word wherever no gradient is recorded.
    """

    @torch.library.impl(f"natten_ext::{name}", "Autograd")
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
            return function.apply(*arguments)
        return _below_autograd(name, arguments)


def _below_autograd(name, arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.natten_ext, name).default(*arguments)


# ---------------------------------------------------------------------------------------------- forward


@torch.library.impl("natten_ext::attention", "CompositeExplicitAutograd")
def _attention(query, key, value, bias, neighborhood, score, scale, backend):
    tensors = map(_dense_rows, (query, key, value, bias))
    return _implementation(backend, score, (query, key, value)).forward(*tensors, neighborhood, score, scale)


@torch.library.register_fake("natten_ext::attention")
def _attention_fake(query, key, value, bias, neighborhood, score, scale, backend):
    _check_devices(query, key, value, bias)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, *tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((2, batch, heads, *tokens), dtype=lse_dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, neighborhood, score, scale, backend = arguments
        output, lse = _below_autograd("attention", arguments)
        ctx.save_for_backward(*tensors, output, lse)
        ctx.choices = neighborhood, score, scale, backend
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, _grad_lse):
        if grad_output is None:
            return (None,) * 8
        *tensors, output, lse = ctx.saved_tensors
        neighborhood, score, scale, backend = ctx.choices
        needs = list(ctx.needs_input_grad[:4])
        # `output` is a function of the other inputs, and its share in the second derivative in the formulas already.
        # Without the detach autograd would run hooks on `output` with the gradient None.
        grads = torch.ops.natten_ext.attention_backward(
            grad_output, *tensors, output.detach(), lse, neighborhood, score, scale, needs, backend
        )
        return *_asked(grads, needs), None, None, None, None


_register_autograd("attention", _Attention)

# ---------------------------------------------------------------------------------------------- backward


@torch.library.impl("natten_ext::attention_backward", "CompositeExplicitAutograd")
def _backward(grad_output, query, key, value, bias, output, lse, neighborhood, score, scale, needs, backend):
    tensors = map(_dense_rows, (grad_output, query, key, value, bias, output))
    module = _implementation(backend, score, (grad_output, query, key, value, output, lse), needs, 4)
    return module.backward(*tensors, lse, neighborhood, score, scale, needs)


@torch.library.register_fake("natten_ext::attention_backward")
def _backward_fake(grad_output, query, key, value, bias, output, lse, neighborhood, score, scale, needs, backend):
    _check_devices(grad_output, query, key, value, bias, output, lse)
    return _fake_gradients((query, key, value, bias), needs)


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, neighborhood, score, scale, needs, backend = arguments
        ctx.save_for_backward(*tensors)
        ctx.choices = neighborhood, score, scale, needs, backend
        ctx.set_materialize_grads(False)
        return _below_autograd("attention_backward", arguments)

    @staticmethod
    def backward(ctx, *cotangents):
        neighborhood, score, scale, given, backend = ctx.choices
        # Gradients that were not asked for are empty; autograd may materialise cotangents for them.
        cotangents = tuple(_asked(cotangents, given))
        if all(c is None for c in cotangents):
            return (None,) * 12
        needs = list(ctx.needs_input_grad[:5])
        grads = torch.ops.natten_ext.attention_double_backward(
            *cotangents, *ctx.saved_tensors, neighborhood, score, scale, needs, backend
        )
        return *_asked(grads, needs), *(None,) * 7


_register_autograd("attention_backward", _AttentionBackward)

# ---------------------------------------------------------------------------------------------- double backward


@torch.library.impl("natten_ext::attention_double_backward", "CompositeExplicitAutograd")
def _double_backward(
    cot_query, cot_key, cot_value, cot_bias, grad_output, query, key, value, bias, output, lse,
    neighborhood, score, scale, needs, backend,
):  # fmt: skip
    tensors = (cot_query, cot_key, cot_value, cot_bias, grad_output, query, key, value, bias, output)
    module = _implementation(backend, score, (grad_output, query, key, value, output, lse), needs, 5)
    return module.double_backward(*map(_dense_rows, tensors), lse, neighborhood, score, scale, needs)


@torch.library.register_fake("natten_ext::attention_double_backward")
def _double_backward_fake(
    cot_query, cot_key, cot_value, cot_bias, grad_output, query, key, value, bias, output, lse,
    neighborhood, score, scale, needs, backend,
):  # fmt: skip
    _check_devices(cot_query, cot_key, cot_value, cot_bias, grad_output, query, key, value, bias, output, lse)
    return _fake_gradients((grad_output, query, key, value, bias), needs)


class _AttentionDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        return _below_autograd("attention_double_backward", arguments)

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError(
            "natten_ext: the third derivative of a fused attention is not implemented;"
            ' use backend="reference", which has every order'
        )


_register_autograd("attention_double_backward", _AttentionDoubleBackward)


def _asked(grads, needs):
    return (grad if need else None for grad, need in zip(grads, needs, strict=True))


def _fake_gradients(inputs, needs):
    pairs = zip(inputs, needs, strict=True)
    return tuple(x.new_empty(x.shape) if need else inputs[0].new_empty((0,)) for x, need in pairs)
