"""Rows of maps that the CPU kernels work on in parts: long ones, and shorter ones of many channels."""

from __future__ import annotations

import pytest

from tests.operators.budget import assert_equal_to_rounding
from tests.operators.cases import (
    Case,
    cotangents_of,
    derivatives,
    forward,
    grad_output_of,
    inputs_of,
    oracle_derivatives,
)

CASES = [
    Case("na-8x259", "neighborhood", (1, 8, 259, 1, 256), kernel=(6, 3), bias=True),
    Case("na-line-1047", "neighborhood", (1, 1047, 2, 8), kernel=9, score="l2", bias=True),
    Case("na-line-1047-causal", "neighborhood", (1, 1047, 2, 8), kernel=9, stride=4, causal=True, bias=True),
]


@pytest.mark.cases(CASES)
def test_parts_of_rows(case):
    inputs = inputs_of(case)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    results = derivatives(lambda leaves: forward(case, leaves, "cpu"), inputs, grad_output, cotangents)
    assert_equal_to_rounding(results, oracle_derivatives(case, inputs, grad_output, cotangents))
