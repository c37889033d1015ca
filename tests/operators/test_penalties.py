"""Penalties on a gradient, the second derivative as training takes it: WGAN-GP through residual blocks, parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.operators.budget import assert_equal_to_rounding
from tests.operators.cases import ONE_OF_EACH, Case, Inputs, forward, inputs_of, oracle_forward

BLOCKS = [
    Case("block-full", "full", (3, 12, 2, 4), small=True),
    Case("block-l2-tied", "full", (3, 12, 2, 4), score="l2", tied=("key",), small=True),
    Case("block-grid", "grid", (3, 4, 6, 2, 4), window=(2, 3), bias=True, small=True),
    Case("block-na", "neighborhood", (3, 6, 7, 2, 4), kernel=(3, 3), dilation=(1, 2), groups=("dilation",), bias=True,
         small=True),
]  # fmt: skip


def block_parameters(case: Case, device: str) -> Inputs:
    """A critic: two residual blocks around the attention, then a nonlinear head."""
    generator = torch.Generator().manual_seed(7)
    width = case.heads * case.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    parameters = {"into": normal(width, 3), "head": normal(1, width)}
    for block in (0, 1):
        parameters |= {f"{block}.{name}": normal(width, width) for name in ("query", "key", "value", "out")}
        if case.bias:
            parameters[f"{block}.bias"] = normal(*case.table_shape)
    return {name: parameter.to(device).requires_grad_() for name, parameter in parameters.items()}


def critic(case: Case, parameters: Inputs, images: Tensor, attend) -> Tensor:
    x = images @ parameters["into"].T
    for block in (0, 1):
        normed = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
        inputs = {}
        for name in ("query", "key", "value"):
            if name not in case.tied:
                inputs[name] = (normed @ parameters[f"{block}.{name}"].T).unflatten(-1, case.shape[-2:])
        if case.bias:
            inputs["bias"] = parameters[f"{block}.bias"]
        x = x + attend(inputs).flatten(-2) @ parameters[f"{block}.out"].T
    return torch.tanh(x.flatten(1, -2).mean(1)) @ parameters["head"].T


def wgan_gp_gradients(case: Case, device: str, attend, second_order: bool = True) -> Inputs:
    """Gradients of a critic's loss with a gradient penalty, with respect to its parameters."""
    generator = torch.Generator().manual_seed(8)
    shape = (*case.shape[:-2], 3)
    real, fake = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    mixed = (0.3 * real + 0.7 * fake).requires_grad_()
    parameters = block_parameters(case, device)
    slope = torch.autograd.grad(critic(case, parameters, mixed, attend).sum(), mixed, create_graph=second_order)[0]
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    loss = critic(case, parameters, fake, attend).mean() - critic(case, parameters, real, attend).mean()
    (loss + 10 * penalty).backward()
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(BLOCKS)
def test_wgan_gp_penalty_through_residual_blocks(any_target, case):
    """The second order reaches every parameter; a library that drops it silently fails here by tens of percent."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    true = wgan_gp_gradients(case, "cpu", lambda inputs: oracle_forward(case, inputs))
    results = wgan_gp_gradients(case, any_target.device, lambda inputs: forward(case, inputs, any_target.backend))
    assert set(results) == set(true)
    for name in true:
        scale = true[name].abs().max()
        assert (results[name].cpu() - true[name]).abs().max() <= 1e-9 * scale, name


@pytest.mark.cases(BLOCKS)
def test_the_penalty_test_can_see_a_dropped_second_order(case):
    """An attention whose backward is a constant to autograd, as in several libraries, changes the gradients a lot."""

    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return oracle_forward(case, dict(zip(ctx_names, tensors, strict=True)))

        @staticmethod
        def backward(ctx, grad_output):
            with torch.enable_grad():
                tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
                output = oracle_forward(case, dict(zip(ctx_names, tensors, strict=True)))
            return torch.autograd.grad(output, tensors, grad_output.detach())

    ctx_names = [n for n in ("query", "key", "value") if n not in case.tied] + ["bias"] * case.bias

    true = wgan_gp_gradients(case, "cpu", lambda inputs: oracle_forward(case, inputs))
    wrong = wgan_gp_gradients(case, "cpu", lambda inputs: Dropped.apply(*(inputs[name] for name in ctx_names)))
    worst = max(float((wrong[name] - true[name]).norm() / true[name].norm()) for name in true if name in wrong)
    assert worst > 0.05


@pytest.mark.cases(ONE_OF_EACH)
def test_a_penalty_on_part_of_the_output(any_target, case):
    """A slice of the output, a slice of the gradient: cotangents that are zero almost everywhere."""
    any_target.skip_unless_can(torch.float64, case.head_dim)

    def gradients(attend, device: str) -> Inputs:
        leaves = {n: t.requires_grad_() for n, t in inputs_of(case, device=device).items()}
        (slope,) = torch.autograd.grad(attend(leaves)[:1, 1].square().sum(), leaves["key"], create_graph=True)
        grads = torch.autograd.grad(slope[..., 0].square().sum(), list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))

    true = gradients(lambda leaves: oracle_forward(case, leaves), "cpu")
    results = gradients(lambda leaves: forward(case, leaves, any_target.backend), any_target.device)
    assert_equal_to_rounding(results, true)
