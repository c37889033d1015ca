"""What autograd keeps and shows: activation checkpointing, changes in place of saved tensors, hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.operators.budget import assert_equal_to_rounding
from tests.operators.cases import ONE_OF_EACH, Inputs, forward, inputs_of, oracle_forward


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(ONE_OF_EACH[:3])
@pytest.mark.parametrize("order", ["first", "second"])
def test_activation_checkpointing(any_target, case, order):
    any_target.skip_unless_can(torch.float64, case.head_dim)

    def gradients(run) -> list[Tensor]:
        leaves = {n: t.requires_grad_() for n, t in inputs_of(case, torch.float64, any_target.device).items()}
        loss = run(leaves).sin().sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=order == "second")
        if order == "second":
            grads = torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()))
        return list(grads)

    def plain(leaves: Inputs) -> Tensor:
        return forward(case, leaves, any_target.backend)

    expected = gradients(plain)
    for one, other in zip(
        gradients(lambda leaves: checkpoint(plain, leaves, use_reentrant=False)), expected, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.cases(ONE_OF_EACH[1:2])
def test_in_place_changes_of_saved_tensors_are_caught(target, case):
    inputs = inputs_of(case, torch.float32, target.device)
    for changed in [*inputs, "output"]:
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        copies = {n: leaf.clone() for n, leaf in leaves.items()}
        output = forward(case, copies, target.backend)
        with torch.no_grad():
            (output if changed == "output" else copies[changed]).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.cases(ONE_OF_EACH[1:2])
def test_in_place_changes_between_the_orders_are_caught(target, case):
    leaves = {n: t.requires_grad_() for n, t in inputs_of(case, torch.float32, target.device).items()}
    copies = {n: leaf.clone() for n, leaf in leaves.items()}
    first = torch.autograd.grad(
        forward(case, copies, target.backend).square().sum(), list(copies.values()), create_graph=True
    )
    with torch.no_grad():
        copies["key"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(grad.square().sum() for grad in first).backward()


@pytest.mark.cases(ONE_OF_EACH)
def test_hooks_get_gradients(any_target, case):
    """On inputs, output and first gradients, under a penalty: no hook sees None, and the output's sees what it would
    see in plain PyTorch."""
    any_target.skip_unless_can(torch.float64, case.head_dim)

    def seen_by_hooks(attend, device: str) -> Inputs:
        leaves = {n: t.requires_grad_() for n, t in inputs_of(case, device=device).items()}
        seen: dict[str, list[Tensor]] = {}

        def hook(name: str, tensor: Tensor) -> Tensor:
            tensor.register_hook(lambda grad: seen.setdefault(name, []).append(grad.detach().clone()))
            return tensor

        output = hook("output", attend({n: hook(n, t * 1) for n, t in leaves.items()}))
        slopes = torch.autograd.grad(output.square().sum(), list(leaves.values()), create_graph=True)
        penalty = sum(hook(f"d_{n}", slope).square().sum() for n, slope in zip(leaves, slopes, strict=True))
        (penalty + output.sum()).backward()
        return {f"{name} {i}": grad for name, grads in seen.items() for i, grad in enumerate(grads)}

    true = seen_by_hooks(lambda leaves: oracle_forward(case, leaves), "cpu")
    assert {"output 0", "output 1"} <= true.keys()
    results = seen_by_hooks(lambda leaves: forward(case, leaves, any_target.backend), any_target.device)
    assert_equal_to_rounding(results, true)


@pytest.mark.cases(ONE_OF_EACH[1:3])
@pytest.mark.parametrize("names", [("query",), ("key", "bias")], ids="-".join)
def test_a_hook_on_the_output_where_only_the_slope_is_penalised(any_target, case, names):
    """A loss linear in the output: its second derivative does not pass through the output, as in plain PyTorch."""
    leaves = {n: t.requires_grad_(n in names) for n, t in inputs_of(case, torch.float32, any_target.device).items()}
    output = forward(case, leaves, any_target.backend)
    seen = []
    output.register_hook(lambda grad: seen.append(grad.square().sum()))
    wanted = [leaves[name] for name in names]
    slopes = torch.autograd.grad(output.sum(), wanted, create_graph=True)
    sum(slope.square().sum() for slope in slopes).backward()
    assert len(seen) == 1
