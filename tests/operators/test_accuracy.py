"""Every backend against the oracle: forward, first and second derivatives, every case and dtype."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import natten_ext
from tests.operators.budget import assert_equal_to_rounding, assert_within_budget
from tests.operators.cases import (
    CASES,
    Case,
    Inputs,
    cotangents_of,
    derivatives,
    find,
    forward,
    grad_output_of,
    inputs_of,
    nonempty_subsets,
    oracle_derivatives,
    tangent,
)
from tests.operators.formulas import plain_formulas, terms

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@cache
def problem(case: Case, dtype: torch.dtype) -> tuple[Inputs, torch.Tensor, Inputs]:
    inputs = inputs_of(case, dtype)
    return inputs, grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)


@cache
def truth(case: Case, dtype: torch.dtype) -> Inputs:
    return oracle_derivatives(case, *problem(case, dtype))


def run(case: Case, dtype: torch.dtype, backend: str, device: str) -> Inputs:
    inputs, grad_output, cotangents = problem(case, dtype)
    inputs, cotangents = ({n: t.to(device) for n, t in tensors.items()} for tensors in (inputs, cotangents))
    return derivatives(lambda leaves: forward(case, leaves, backend), inputs, grad_output.to(device), cotangents)


@cache
def plain(case: Case, dtype: torch.dtype) -> list[Inputs]:
    """Plain PyTorch at `dtype`: the definition through autograd, and the closed formulas."""
    return [
        oracle_derivatives(case, *problem(case, dtype), dtype=dtype),
        plain_formulas(case, *problem(case, dtype), dtype),
    ]


def check(results: Inputs, case: Case, dtype: torch.dtype, factor: float = 2) -> None:
    absolute = terms(case, *problem(case, dtype))
    assert_within_budget(results, plain(case, dtype), truth(case, dtype), absolute, dtype, factor)


@pytest.mark.samples(native=600, emulated=36, interpreted=24)
@pytest.mark.cases(CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_all_orders_stay_within_the_error_budget(target, case, dtype):
    target.skip_unless_can(dtype, case.head_dim)
    check(run(case, dtype, target.backend, target.device), case, dtype)


@pytest.mark.samples(native=120, emulated=16, interpreted=8)
@pytest.mark.cases(CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_tangents_stay_within_the_budget_of_all_orders(target, case, dtype):
    """What the double backward gives for `grad_output` is the derivative of the output along the cotangents."""
    target.skip_unless_can(dtype, case.head_dim)
    inputs, _, cotangents = problem(case, dtype)
    there, given = ({n: t.to(target.device) for n, t in tensors.items()} for tensors in (inputs, cotangents))
    results = {"dd_grad_output": tangent(case, there, given, target.backend)}
    absolute, true = terms(case, *problem(case, dtype)), {"dd_grad_output": truth(case, dtype)["dd_grad_output"]}
    assert_within_budget(results, plain(case, dtype), true, absolute, dtype)


@pytest.mark.cases(CASES)
def test_reference_is_the_definition(case):
    check(run(case, torch.float64, "reference", "cpu"), case, torch.float64)


@pytest.mark.cases([case for case in CASES if case.small])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_reference_in_low_precision(case, dtype):
    """It is plain PyTorch as well, so by chance it may be the worse one."""
    check(run(case, dtype, "reference", "cpu"), case, dtype, factor=4)


@pytest.mark.cases([case for case in CASES if case.bias])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_float32_table_beside_half_precision_maps(target, case, dtype):
    target.skip_unless_can(dtype, case.head_dim)
    inputs, grad_output, cotangents = problem(case, dtype)
    inputs = inputs | {"bias": inputs["bias"].float()}
    cotangents = cotangents | {"bias": cotangents["bias"].float()}
    there, given = ({n: t.to(target.device) for n, t in tensors.items()} for tensors in (inputs, cotangents))
    results = derivatives(
        lambda leaves: forward(case, leaves, target.backend), there, grad_output.to(target.device), given
    )
    tables = ("d_bias", "dd_bias")
    assert all(results[name].dtype == torch.float32 for name in tables)
    results |= {name: results[name].to(dtype) for name in tables}
    # The tables hold the numbers of `problem`, so do the plain results and the truth.
    check(results, case, dtype)


COTANGENT_CASES = [
    find("full-self-9"),
    find("full-self-9", score="l2", tied=("key",)),
    find("full-cross-13x29", score="l2"),
    find("grid-6x10-w3x5", score="l2", bias=True),
    find("grid-4x3-w1", bias=True),
    find("na-9x10-kernels", bias=True),
    find("na-11x9-per-head", score="l2", bias=True),
]


@pytest.mark.cases(COTANGENT_CASES)
def test_every_combination_of_cotangents(any_target, case):
    """The double backward may get any subset of its cotangents; the rest are None."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs, grad_output, cotangents = problem(case, torch.float64)
    inputs_there = {n: t.to(any_target.device) for n, t in inputs.items()}
    subsets = nonempty_subsets(inputs)
    for names in subsets[:: 5 if any_target.slow else 1]:
        given = {n: cotangents[n].to(any_target.device) for n in names}
        results = derivatives(
            lambda leaves: forward(case, leaves, any_target.backend),
            inputs_there,
            grad_output.to(any_target.device),
            given,
        )
        true = oracle_derivatives(case, inputs, grad_output, given)
        assert_equal_to_rounding(results, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_half_is_read_and_rounded_as_torch_does(target, dtype):
    """One key: the output is the value. Two equal ones: it is their mean, rounded once from float32."""
    target.skip_unless_can(dtype, 256)
    if target.slow and target.interpreted:
        pytest.skip("the compiler's conversions are not the interpreter's")
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()].view(-1, 1, 1, 256)
    zeros = torch.zeros_like(every)
    for values in (every, torch.cat([every, every.flip(0)], 1)):
        q, k, v = (x.to(target.device) for x in (zeros, torch.zeros_like(values), values))
        output = natten_ext.attention(q, k, v, backend=target.backend)
        expected = values.float().mean(1, keepdim=True).to(dtype)
        assert torch.equal(output.cpu(), expected)
    one_key = every.reshape(1, 1, -1, 1, 32).to(target.device)  # kernels of neighborhoods move rows in their own way
    output = natten_ext.neighborhood_attention(torch.zeros_like(one_key), one_key, one_key, 1, backend=target.backend)
    assert torch.equal(output, one_key)
