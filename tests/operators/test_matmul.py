"""The parts that the `matmul` backend cuts problems into; what they compute, the tests of every backend compare."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import natten_ext
from natten_ext.backends import matmul
from tests.operators.budget import assert_equal_to_rounding
from tests.operators.cases import (
    Case,
    cotangents_of,
    derivatives,
    find,
    forward,
    grad_output_of,
    inputs_of,
    oracle_derivatives,
)

CASES = [
    find("full-cross-13x29", score="l2"),
    find("grid-6x10-w3x5", bias=True),
    Case("grid-shared", "grid", (2, 4, 6, 4, 8), window=(2, 3), bias=True, shared=2, score="l2"),
    Case("full-shared", "full", (2, 7, 6, 4), shared=3),
    Case("grid-volume", "grid", (1, 4, 2, 6, 2, 4), window=(2, 2, 3), bias=True),
]


@pytest.mark.parametrize("part", [12, 300])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_do_not_depend_on_the_parts(case, part, monkeypatch):
    """Of single rows, or of several windows."""
    monkeypatch.setattr(matmul, "PART", part)
    inputs = inputs_of(case)
    problem = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    results = derivatives(lambda leaves: forward(case, leaves, "matmul"), inputs, *problem)
    assert_equal_to_rounding(results, oracle_derivatives(case, inputs, *problem))


class Largest(TorchDispatchMode):
    """The most elements that a new tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, result.numel())
        return result


MORE_KEYS_THAN_CHANNELS = [
    Case("many-sequences", "full", (64, 24, 2, 4)),
    Case("many-windows", "grid", (64, 8, 12, 2, 4), window=(4, 6), bias=True, score="l2"),
]


@pytest.mark.parametrize("case", MORE_KEYS_THAN_CHANNELS, ids=str)
def test_scores_are_in_memory_for_a_part_alone(case, monkeypatch):
    inputs = inputs_of(case, torch.float32)
    part = math.prod(case.shape[:-1]) * 24 // 16
    monkeypatch.setattr(matmul, "PART", part)
    seen, results = Largest(), matmul._Call.results

    def watched(call):
        with seen:
            return results(call)

    monkeypatch.setattr(matmul._Call, "results", watched)
    problem = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    derivatives(lambda leaves: forward(case, leaves, "matmul"), inputs, *problem)
    assert part / 2 < seen.elements <= part


def test_the_table_of_a_window_and_its_gradient():
    """`_table_places` and `_over_offsets` are one map and its transpose."""
    window = (2, 3, 4)
    places = matmul._table_places(window, torch.device("cpu"))
    index = places[None, :] - places[:, None] + places[-1]
    table = torch.randn(2, *(2 * size - 1 for size in window), dtype=torch.float64)
    sums = torch.randn(2, len(places), len(places), dtype=torch.float64)
    expected = torch.zeros_like(table).flatten(1).index_add_(1, index.flatten(), sums.flatten(1))
    torch.testing.assert_close(matmul._over_offsets(sums, window), expected.view_as(table))


def test_no_queries():
    query = torch.zeros(2, 0, 3, 8, requires_grad=True)
    key, value = (torch.randn(2, 5, 3, 8, requires_grad=True) for _ in range(2))
    output = natten_ext.attention(query, key, value, backend="matmul")
    first = torch.autograd.grad(output.sum(), (key, value), create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), (key, value))
    assert output.shape == query.shape and not any(x.any() for x in (*first, *second))


@pytest.mark.parametrize("mean", [0, 30])
def test_a_mean_of_values_costs_no_digits_in_half_precision(mean):
    """It is in the output, whose rounding must not come into gradients: that of a table in float32 shows it."""
    case = Case("half", "grid", (1, 8, 8, 2, 16), window=8, bias=True)
    inputs = inputs_of(case, torch.bfloat16)
    inputs["value"] += mean
    inputs["bias"] = inputs["bias"].float()
    problem = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    results = derivatives(lambda leaves: forward(case, leaves, "matmul"), inputs, *problem)
    truth = oracle_derivatives(case, inputs, *problem)
    for name in ("d_bias", "dd_bias"):
        torch.testing.assert_close(
            results[name].double(), truth[name], rtol=0, atol=1e-4 * float(truth[name].abs().max())
        )
