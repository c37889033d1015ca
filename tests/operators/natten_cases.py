"""Problems that NATTEN can state, and how code written for it solves them."""

from __future__ import annotations

import torch

from natten_ext import compat
from tests.operators.cases import CASES, Case

# NATTEN has one kernel, dilation and stride for all heads.
NATTEN_CASES = [
    case for case in CASES if case.kind == "neighborhood" and not (case.groups or case.tied) and case.score == "dot"
]
UNFUSED = [case for case in NATTEN_CASES if case.stride == 1 and case.shared == 1]


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(-2, 1)


def windows_of(case: Case) -> dict[str, object]:
    """As the unfused functions take them."""
    return {"kernel_size": case.kernel, "dilation": case.dilation, "is_causal": case.causal}


def scores_of(case: Case, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    query, key = (heads_first(inputs[name]) for name in ("query", "key"))
    qk = getattr(compat, f"na{case.axes}d_qk")
    return qk(query * case.effective_scale, key, **windows_of(case), rpb=inputs.get("bias"))


def unfused(case: Case, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The case as code written for NATTEN 0.17 computes it."""
    weights = scores_of(case, inputs).softmax(-1)
    av = getattr(compat, f"na{case.axes}d_av")
    return av(weights, heads_first(inputs["value"]), **windows_of(case)).movedim(1, -2)


def close(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            results[name], expected[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
