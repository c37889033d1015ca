"""Numerical derivatives of the first and second order, for every neighborhood, score and table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.operators.cases import TINY, Case, forward, inputs_of


def function_of(case: Case, backend: str, device: str):
    inputs = inputs_of(case, torch.float64, device)
    names = list(inputs)

    def function(*tensors):
        return forward(case, dict(zip(names, tensors, strict=True)), backend)

    return function, [tensor.requires_grad_() for tensor in inputs.values()]


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(TINY)
def test_gradcheck(any_target, case):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    function, inputs = function_of(case, any_target.backend, any_target.device)
    assert gradcheck(function, inputs, fast_mode=any_target.slow)


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(TINY)
def test_gradgradcheck(any_target, case):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    function, inputs = function_of(case, any_target.backend, any_target.device)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(TINY[:1])
def test_gradcheck_when_query_key_and_value_are_one_tensor(any_target, case):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    for score in ("dot", "l2"):
        function, inputs = function_of(
            replace(case, score=score, tied=("key", "value")), any_target.backend, any_target.device
        )
        assert gradcheck(function, inputs, fast_mode=any_target.slow)
        assert gradgradcheck(function, inputs, fast_mode=True)
