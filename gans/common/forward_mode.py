"""Forward mode through a network, with reverse mode to its parameters around it.

PyTorch's layer, batch and instance norm have a forward mode that takes the mean and the deviation for constants
where it is differentiated again: the gradient of a Jacobian-vector product through them is wrong, and nothing says so
(seen with torch 2.13; pytorch/pytorch issues 196699 and 196700 are the same in forward mode twice). Here the tangents
of the first two are computed otherwise; other ways to call such a norm are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def directional_derivative(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    """J v, the derivative of `function` at `x` along `direction` (`x`'s shape), in the shape of its result.

    One pass in forward mode. The result has a graph to whatever `function` closes over, such as the parameters of a
    network, and none to `x`. NotImplementedError for a norm whose tangent has a wrong gradient in PyTorch.
    """
    with forward_ad.dual_level(), _TrueNorms():
        _, tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x.detach(), direction)))
        if tangent is None:
            raise ValueError("the result of function does not depend on x")
    return tangent


class _TrueNorms(TorchFunctionMode):
    """Inside, tangents of layer and batch norms carry the whole gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _REFUSED:
            raise NotImplementedError(
                f"forward mode through {func.__name__}: PyTorch's gradient of its tangent is wrong. Of "
                "loss.penalty_mode, 'exact' and 'finite-difference' do without it"
            )
        return _NORMS.get(func, func)(*args, **kwargs)


def _layer_norm(
    input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    y = _normalize(lambda x: F.layer_norm(x, shape, eps=eps), input)
    return _affine(y, weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    y = _normalize(
        lambda x: F.batch_norm(x, running_mean, running_var, training=training, momentum=momentum, eps=eps), input
    )
    shape = (-1, *[1] * (input.dim() - 2))
    return _affine(y, *(None if p is None else p.view(shape) for p in (weight, bias)))


def _normalize(norm: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """`norm(input)` with its tangent, for a norm without weight and bias.

    Its Jacobian `(1 - 1 1^T / n - y y^T / n) / deviation` is symmetric: the tangent J t is the backward J^T t, whose
    derivative PyTorch has right.
    """
    x, tangent = forward_ad.unpack_dual(input)
    x = x if x.requires_grad else x.detach().requires_grad_()
    y = norm(x)
    if tangent is None:
        return y
    (slope,) = torch.autograd.grad(y, x, tangent.to(y.dtype), create_graph=True)
    return forward_ad.make_dual(y, slope.to(y.dtype))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


_NORMS: dict[Any, Callable[..., Tensor]] = {F.layer_norm: _layer_norm, F.batch_norm: _batch_norm}
_REFUSED = {F.instance_norm, torch.layer_norm, torch.batch_norm, torch.instance_norm, torch.native_layer_norm}
