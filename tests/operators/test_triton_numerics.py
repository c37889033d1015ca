"""Numbers at the edge that are particular to the triton backend: tables that mask, NaN within tiles."""

from __future__ import annotations

import math

import pytest
import torch

from natten_ext.backends.triton import backend
from tests.operators.budget import largest_error
from tests.operators.cases import (
    Case,
    cotangents_of,
    derivatives,
    forward,
    grad_output_of,
    inputs_of,
    magnitude,
    oracle_derivatives,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRID = Case("edge-grid", "grid", (1, 4, 6, 1, 8), window=(2, 3), bias=True, small=True)
NEIGHBORHOOD = Case("edge-na", "neighborhood", (1, 8, 8, 1, 8), kernel=7, bias=True, small=True)


@pytest.fixture(autouse=True)
def _can_run():
    if backend.cannot_run(DEVICE, torch.float32, 8):
        pytest.skip("the triton backend cannot run here")


def solve(case, inputs, grad_output, cotangents):
    there, given = ({n: x.to(DEVICE) for n, x in tensors.items()} for tensors in (inputs, cotangents))
    results = derivatives(lambda leaves: forward(case, leaves, "triton"), there, grad_output.to(DEVICE), given)
    return {name: result.cpu() for name, result in results.items()}


FILLED = {"least": "least", "largest": "largest", "-1e31": -1e31, "minus infinity": -math.inf}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", ["all", "half"])
@pytest.mark.parametrize("number", FILLED)
@pytest.mark.parametrize("case", [GRID, NEIGHBORHOOD], ids=str)
def test_tables_that_mask(case, number, part, dtype):
    """Numbers as large as there are, in all of the table or in half of it, in all orders: as in plain PyTorch."""
    value = {"least": torch.finfo(dtype).min, "largest": torch.finfo(dtype).max}.get(number, FILLED[number])
    inputs = inputs_of(case, dtype)
    inputs["bias"].view(-1)[:: 1 if part == "all" else 2] = value
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    results = solve(case, inputs, grad_output, cotangents)
    for name, true in oracle_derivatives(case, inputs, grad_output, cotangents).items():
        assert torch.equal(results[name].isnan(), true.isnan()), name
        error = largest_error(results[name].nan_to_num(0), true.nan_to_num(0))
        assert error <= 32 * torch.finfo(dtype).eps * max(1, magnitude([true.nan_to_num(0)])), name


@pytest.mark.parametrize("where", ["query", "key", "value", "grad_output", "cotangent of query", "cotangent of value"])
def test_nan_stays_near_the_tiles_that_see_it(where):
    """It spreads through a tile, which masked products do not prevent, and in each order to the tiles next to it."""
    configs = pytest.importorskip("natten_ext.backends.triton.configs")
    case = Case("edge-tiles", "neighborhood", (1, 4, 24, 1, 8), kernel=3, bias=True, small=True)
    inputs = inputs_of(case, torch.float32)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    owner, _, name = where.rpartition(" of ")
    tensor = grad_output if name == "grad_output" else (cotangents if owner else inputs)[name]
    tensor[0, 0, 0] = math.nan
    with configs.forced(configs.Config(16, 16, 4, 1)):
        results = solve(case, inputs, grad_output, cotangents)
    assert any(result.isnan().any() for result in results.values())
    for name, result in results.items():
        if not name.endswith("bias"):
            assert result[0, :, 16:].isfinite().all(), name
