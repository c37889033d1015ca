"""Under ``torch.autocast``: its dtype, float64 left alone, mixed dtypes."""

from __future__ import annotations

import pytest
import torch

import natten_ext
from tests.operators.cases import find, forward, grad_output_of, inputs_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_runs_in_the_autocast_dtype(any_target, dtype):
    any_target.skip_unless_can(dtype)
    case = find("na-7x9-k3", bias=True)
    inputs = inputs_of(case, torch.float32, any_target.device)
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    with torch.autocast(any_target.device, dtype=dtype):
        output = forward(case, leaves, any_target.backend)
    assert output.dtype == dtype
    halves = {n: t.clone().requires_grad_() if n == "bias" else t.to(dtype).requires_grad_() for n, t in inputs.items()}
    expected = forward(case, halves, any_target.backend)
    assert torch.equal(output, expected)
    grad_output = grad_output_of(case, expected.detach())
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output)
    for grad, other in zip(grads, torch.autograd.grad(expected, list(halves.values()), grad_output), strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, other.float())


def test_autocast_leaves_float64_alone(any_target):
    any_target.skip_unless_can(torch.float64)
    case = find("full-self-9")
    with torch.autocast(any_target.device, dtype=torch.bfloat16):
        assert forward(case, inputs_of(case, device=any_target.device), any_target.backend).dtype == torch.float64


def test_autocast_unifies_mixed_dtypes(any_target):
    """A projection under autocast gives bfloat16 beside a float32 buffer."""
    any_target.skip_unless_can(torch.bfloat16)
    query, key, value = torch.randn(3, 2, 5, 2, 8, device=any_target.device).unbind(0)
    with torch.autocast(any_target.device, dtype=torch.bfloat16):
        output = natten_ext.attention(query.bfloat16(), key, value, backend=any_target.backend)
    expected = natten_ext.attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), backend=any_target.backend)
    assert torch.equal(output, expected)
