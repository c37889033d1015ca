"""How far a result may be from the truth.

The error against the float64 oracle may be twice the error of the same computation in plain PyTorch at the
same dtype, plus two units in the last place. Errors are the largest over the tensor, and of several plain
computations (autograd's graph, the closed formulas) the worst one counts. The units are those of the largest
element in half precision. What cancels leaves rounding errors of the size of its terms behind: in float32 and
float64 the units are therefore those of the largest sum of absolute terms behind an element, and in half
precision, where sums are in float32, a few float32 units of that sum are allowed on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.operators.cases import Inputs, magnitude, ulp


def largest_error(result: Tensor, truth: Tensor) -> float:
    return magnitude([result.detach().cpu().double() - truth.detach().cpu().double()])


def assert_within_budget(
    results: Mapping[str, Tensor],
    plain: Sequence[Mapping[str, Tensor]],
    truth: Mapping[str, Tensor],
    terms: Mapping[str, Tensor],
    dtype: torch.dtype,
    factor: float = 2,
) -> None:
    """Every tensor of `results` within the budget that the computations `plain` set, all measured against `truth`."""
    half = torch.finfo(dtype).bits == 16
    problems = []
    for name, true in truth.items():
        result = results[name]
        assert result.shape == true.shape, f"{name} has shape {tuple(result.shape)}, not {tuple(true.shape)}"
        assert result.dtype == dtype, f"{name} is {result.dtype}, not {dtype}"
        of_terms = magnitude([terms[name]])
        allowed = factor * max(largest_error(other[name], true) for other in plain)
        if half:
            allowed += 2 * ulp(magnitude([true]), dtype) + 16 * ulp(of_terms, torch.float32)
        else:
            # In float64 the truth is rounded as well.
            allowed += (64 if dtype == torch.float64 else 2) * ulp(of_terms, dtype)
        error = largest_error(result, true)
        if not error <= allowed:  # catches NaN
            problems.append(f"{name}: error {error:.3g} of at most {allowed:.3g} (terms {of_terms:.3g})")
    assert not problems, "; ".join(problems)


def assert_equal_to_rounding(results: Inputs, truth: Inputs, tolerance: float = 1e-11) -> None:
    """Float64 results equal to the truth up to `tolerance` times the largest magnitude of each tensor (at least 1)."""
    assert results.keys() == truth.keys()
    for name, true in truth.items():
        assert results[name].shape == true.shape, name
        error = largest_error(results[name], true)
        assert error <= tolerance * max(1.0, magnitude([true])), f"{name}: error {error:.3g}"


def assert_same_bits(first: Inputs, second: Inputs) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), (
            f"{name} differs in {(first[name] != second[name]).sum()} elements"
        )
