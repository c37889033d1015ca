"""Ill-conditioned problems: the error stays that of the plain formula in plain PyTorch at the same dtype.

Against the float64 oracle of the same (rounded) inputs, every result of all three orders may be 1.5 times as far off
as the formula written plainly (scores as products, or as sums of squared differences, softmax, product), plus a few
units in the last place of the result's largest element. Where the truth is zero and the plain formula finds it, so must
a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from budget import largest_error
from cases import (
    Case,
    Inputs,
    cotangents_of,
    derivatives,
    forward,
    grad_output_of,
    inputs_of,
    magnitude,
    oracle_derivatives,
    ulp,
)

# Backend -> problems (by the first word of their names) that it does not solve well enough yet.
NOT_YET: dict[str, set[str]] = {
    "cpu": {"shifted", "peaked", "huge", "one", "mean"},
    "cuda": {"shifted", "peaked", "huge", "one", "mean"},
    "triton": {"shifted", "peaked", "huge", "one", "mean"},
    "reference": {"shifted", "peaked", "huge", "one", "mean"},
}

UNITS = 4
# Weights below float32's range are zero; multiplied by scales of 1e4 and more they would not be.
TINY = 1e-30

FULL = Case("conditioning-full", "full", (1, 7, 2, 16), small=True)
CROSS = Case("conditioning-cross", "full", (1, 5, 1, 16), keys=9, small=True)
GRID = Case("conditioning-grid", "grid", (1, 4, 6, 1, 8), window=(2, 3), bias=True, small=True)
WINDOWS = Case("conditioning-na", "neighborhood", (1, 5, 5, 2, 40), kernel=3, bias=True, small=True)
DILATED = Case("conditioning-dilated", "neighborhood", (1, 7, 6, 1, 8), kernel=(3, 2), dilation=2, small=True)


@dataclass(frozen=True)
class Problem:
    """A case and what is done to its normal inputs."""

    name: str
    case: Case
    change: Callable[[Inputs], Inputs]

    def __str__(self) -> str:
        return f"{self.name}-{self.case}"


def shifted(size: float) -> Callable[[Inputs], Inputs]:
    """A vector that all queries and keys have in common."""
    return lambda inputs: inputs | {n: inputs[n] + size for n in ("query", "key") if n in inputs}


def mean(size: float) -> Callable[[Inputs], Inputs]:
    return lambda inputs: inputs | {n: inputs[n] + size for n in ("key", "value")}


def same(inputs: Inputs) -> Inputs:
    return inputs


def peaked(inputs: Inputs) -> Inputs:
    """Every query is its own key: it attends itself nearly alone."""
    return inputs | {"key": inputs["query"].clone()}


PROBLEMS = [
    *(
        Problem(f"shifted by {size}", replace(case, score="l2", tied=tied), shifted(size))
        for size in (10, 100, 1000)
        for case, tied in ((FULL, ("key",)), (CROSS, ()), (GRID, ()), (WINDOWS, ()), (DILATED, ("key",)))
    ),
    *(
        Problem(f"peaked at {scale}", replace(case, scale=scale, score=score), peaked)
        for scale in (1, 30)
        for case in (FULL, GRID, WINDOWS)
        for score in ("dot", "l2")
    ),
    *(
        Problem("huge logits", replace(case, scale=1e4, score=score), same)
        for case in (FULL, CROSS, WINDOWS)
        for score in ("dot", "l2")
    ),
    *(
        Problem("one key", replace(case, score=score), same)
        for case in (
            Case("conditioning-token", "full", (2, 1, 2, 8), small=True),
            Case("conditioning-window", "neighborhood", (1, 5, 5, 2, 40), kernel=1, bias=True, small=True),
        )
        for score in ("dot", "l2")
    ),
    *(
        Problem("mean of 10", replace(case, score=score), mean(10))
        for case in (FULL, CROSS, GRID, WINDOWS, DILATED)
        for score in ("dot", "l2")
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@cache
def problem_in(problem: Problem, dtype: torch.dtype) -> tuple[Inputs, torch.Tensor, Inputs]:
    inputs = {n: x.to(dtype) for n, x in problem.change(inputs_of(problem.case)).items()}
    return inputs, grad_output_of(problem.case, inputs["query"]), cotangents_of(problem.case, inputs)


@pytest.mark.interpreted(24)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_errors_are_those_of_the_plain_formula(any_target, problem, dtype, request):
    any_target.skip_unless_can(dtype, problem.case.head_dim)
    if problem.name.split()[0] in NOT_YET.get(any_target.backend, ()):
        request.applymarker(pytest.mark.xfail(reason="NOT_YET"))
    case, (inputs, grad_output, cotangents) = problem.case, problem_in(problem, dtype)
    true = oracle_derivatives(case, inputs, grad_output, cotangents)
    plain = oracle_derivatives(case, inputs, grad_output, cotangents, dtype=dtype, expanded=False)
    there, given = ({n: x.to(any_target.device) for n, x in tensors.items()} for tensors in (inputs, cotangents))
    results = derivatives(
        lambda leaves: forward(case, leaves, any_target.backend), there, grad_output.to(any_target.device), given
    )
    problems = []
    for name, truth in true.items():
        error, of_plain = largest_error(results[name], truth), largest_error(plain[name], truth)
        allowed = 1.5 * of_plain + UNITS * ulp(magnitude([truth]), dtype) + TINY
        if not error <= allowed:  # catches NaN
            problems.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}, plain {of_plain:.3g}")
    assert not problems, "; ".join(problems)
