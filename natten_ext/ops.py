"""The three operators behind every fused backend, chained by autograd: forward, backward, double backward.

Tensors are sequences ``(batch, tokens, heads, head_dim)`` or maps ``(batch, height, width, heads, head_dim)``.
``neighborhood`` is the integer code of ``natten_ext.geometry``; ``backend`` names a fused backend. The formulas are
in docs/double_backward.md. What ``needs`` does not ask for comes back as an empty tensor.

``lse`` is each row's log-sum-exp in two parts ``(2, batch, heads, *tokens)``, in the units of the kernels: the score,
times log2(e), from which weights were counted (``base``, about the largest), and log2 of the sum of those weights
(``log_sum``). Added up they would round: scores of 1e5 would leave float32 weights two digits.
"""

from __future__ import annotations

import torch

from .dispatch import FUSED

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


# ---------------------------------------------------------------------------------------------- forward


@torch.library.impl("natten_ext::attention", "CompositeExplicitAutograd")
def _attention(query, key, value, bias, neighborhood, score, scale, backend):
    tensors = map(_dense_rows, (query, key, value, bias))
    return FUSED[backend].forward(*tensors, neighborhood, score, scale)


@torch.library.register_fake("natten_ext::attention")
def _attention_fake(query, key, value, bias, neighborhood, score, scale, backend):
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, *tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((2, batch, heads, *tokens), dtype=lse_dtype)


def _attention_setup(ctx, inputs, output):
    *tensors, neighborhood, score, scale, backend = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.choices = neighborhood, score, scale, backend
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _attention_backward_of_forward(ctx, grad_output, _grad_lse):
    if grad_output is None:
        return (None,) * 8
    neighborhood, score, scale, backend = ctx.choices
    needs = list(ctx.needs_input_grad[:4])
    grads = torch.ops.natten_ext.attention_backward(
        grad_output, *ctx.saved_tensors, neighborhood, score, scale, needs, backend
    )
    return *_asked(grads, needs), None, None, None, None


torch.library.register_autograd("natten_ext::attention", _attention_backward_of_forward, setup_context=_attention_setup)

# ---------------------------------------------------------------------------------------------- backward


@torch.library.impl("natten_ext::attention_backward", "CompositeExplicitAutograd")
def _backward(grad_output, query, key, value, bias, output, lse, neighborhood, score, scale, needs, backend):
    tensors = map(_dense_rows, (grad_output, query, key, value, bias, output))
    return FUSED[backend].backward(*tensors, lse, neighborhood, score, scale, needs)


@torch.library.register_fake("natten_ext::attention_backward")
def _backward_fake(grad_output, query, key, value, bias, output, lse, neighborhood, score, scale, needs, backend):
    return _fake_gradients((query, key, value, bias), needs)


def _backward_setup(ctx, inputs, output):
    *tensors, neighborhood, score, scale, needs, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.choices = neighborhood, score, scale, needs, backend
    ctx.set_materialize_grads(False)


def _double_backward_of_backward(ctx, *cotangents):
    neighborhood, score, scale, given, backend = ctx.choices
    # Gradients that were not asked for are empty; autograd may materialise cotangents for them.
    cotangents = tuple(_asked(cotangents, given))
    if all(c is None for c in cotangents):
        return (None,) * 12
    needs = list(ctx.needs_input_grad[:5])
    # `output` and `lse` are functions of the other inputs: their share is in the formulas already.
    grads = torch.ops.natten_ext.attention_double_backward(
        *cotangents, *ctx.saved_tensors, neighborhood, score, scale, needs, backend
    )
    return *_asked(grads, needs), *(None,) * 7


torch.library.register_autograd(
    "natten_ext::attention_backward", _double_backward_of_backward, setup_context=_backward_setup
)

# ---------------------------------------------------------------------------------------------- double backward


@torch.library.impl("natten_ext::attention_double_backward", "CompositeExplicitAutograd")
def _double_backward(
    cot_query, cot_key, cot_value, cot_bias, grad_output, query, key, value, bias, output, lse,
    neighborhood, score, scale, needs, backend,
):  # fmt: skip
    tensors = (cot_query, cot_key, cot_value, cot_bias, grad_output, query, key, value, bias, output)
    return FUSED[backend].double_backward(*map(_dense_rows, tensors), lse, neighborhood, score, scale, needs)


@torch.library.register_fake("natten_ext::attention_double_backward")
def _double_backward_fake(
    cot_query, cot_key, cot_value, cot_bias, grad_output, query, key, value, bias, output, lse,
    neighborhood, score, scale, needs, backend,
):  # fmt: skip
    return _fake_gradients((grad_output, query, key, value, bias), needs)


def _third_derivative(ctx, *cotangents):
    raise RuntimeError(
        "natten_ext: the third derivative of a fused attention is not implemented;"
        ' use backend="reference", which has every order'
    )


torch.library.register_autograd("natten_ext::attention_double_backward", _third_derivative)


def _asked(grads, needs):
    return (grad if need else None for grad, need in zip(grads, needs, strict=True))


def _fake_gradients(inputs, needs):
    pairs = zip(inputs, needs, strict=True)
    return tuple(x.new_empty(x.shape) if need else inputs[0].new_empty((0,)) for x, need in pairs)
