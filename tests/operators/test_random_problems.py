"""Problems drawn at random, of any shape and layout, against the oracle in all orders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
from tests.operators.layouts import LAYOUTS


@st.composite
def cases(draw) -> Case:
    kind = draw(st.sampled_from(["full", "grid", "neighborhood", "neighborhood"]))
    batch, heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4]))
    head_dim = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 96, 128, 255])))
    fields = {
        "score": draw(st.sampled_from(["dot", "l2"])),
        "scale": draw(st.sampled_from([None, 0.05, 1.0])),
    }
    if kind == "full":
        keys = draw(st.one_of(st.none(), st.integers(1, 70)))
        return Case("random", kind, (batch, draw(st.integers(1, 70)), heads, head_dim), keys=keys, **fields)
    fields["bias"] = draw(st.booleans())
    if kind == "grid":
        window = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
        height, width = (w * draw(st.integers(1, 3 if w < 5 else 2)) for w in window)
        return Case("random", kind, (batch, height, width, heads, head_dim), window=window, **fields)
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if heads % g == 0]))
    small = st.tuples(st.integers(1, 5), st.integers(1, 5))
    steps = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernels, dilations = (tuple(draw(s) for _ in range(groups)) for s in (small, steps))
    height, width = (
        max(k[axis] * d[axis] for k, d in zip(kernels, dilations, strict=True)) + draw(st.integers(0, 4))
        for axis in (0, 1)
    )
    shape = (batch, height, width, heads, head_dim)
    return Case("random", kind, shape, kernel=kernels, dilation=dilations, groups=("kernel", "dilation"), **fields)


@given(case=cases(), layout=st.sampled_from([None, *LAYOUTS]))
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_random_problems(any_target, case, layout):
    if any_target.slow:
        pytest.skip("for native kernels")
    if not any_target.can(torch.float64, case.head_dim):
        return
    inputs = inputs_of(case)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    true = oracle_derivatives(case, inputs, grad_output, cotangents)
    if layout is not None and not (layout.__name__ == "packed" and case.keys):
        inputs = layout(inputs)
    results = derivatives(
        lambda leaves: forward(case, leaves, any_target.backend),
        {n: t.to(any_target.device) for n, t in inputs.items()},
        grad_output.to(any_target.device),
        {n: t.to(any_target.device) for n, t in cotangents.items()},
    )
    assert_equal_to_rounding(results, true, 1e-11)
