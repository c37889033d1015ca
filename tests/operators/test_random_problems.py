"""Problems drawn at random, of any shape and layout, against the oracle in all orders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.operators.budget import assert_equal_to_rounding
from tests.operators.cases import (
    SIZES,
    Case,
    cotangents_of,
    derivatives,
    forward,
    grad_output_of,
    inputs_of,
    oracle_derivatives,
)
from tests.operators.layouts import LAYOUTS


def _on_axes(draw, axes: int, least: int, most: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(least, most)) for _ in range(axes))


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
    axes = draw(st.sampled_from([1, 2, 2, 3]))
    kernels = tuple(_on_axes(draw, axes, 1, {1: 20, 2: 5, 3: 3}[axes]) for _ in range(groups))
    dilations = tuple(_on_axes(draw, axes, 1, 3 if axes < 3 else 2) for _ in range(groups))
    extents = tuple(
        max(k[axis] * d[axis] for k, d in zip(kernels, dilations, strict=True)) + draw(st.integers(0, 20 // axes**2))
        for axis in range(axes)
    )
    if draw(st.booleans()):
        fields["stride"] = tuple(tuple(draw(st.integers(1, size)) for size in kernel) for kernel in kernels)
        fields["causal"] = tuple(draw(st.booleans()) for _ in range(axes))
    sizes = {"kernel": kernels, "dilation": dilations, **fields}
    lists = tuple(field for field in SIZES if field in sizes)
    return Case("random", kind, (batch, *extents, heads, head_dim), groups=lists, **sizes)


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
    if not any_target.can(torch.float64, case.head_dim) or not any_target.takes(case):
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
