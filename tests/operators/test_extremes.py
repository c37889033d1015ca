"""Numbers at the edge: huge logits, tiny and huge inputs, NaN that stays where it belongs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import natten_ext
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

SOME = [
    find("full-self-9"),
    find("full-self-9", score="l2", tied=("key",)),
    find("full-one-key"),
    find("grid-6x10-w3x5", bias=True),
    find("na-7x9-k3", score="l2", bias=True),
    find("na-11x9-per-head", bias=True),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]

# Backends that carry NaN and infinity out of windows.
LEAKS: set[str] = {"triton"}


def solve(case: Case, target, inputs, order: int = 2):
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    return derivatives(lambda leaves: forward(case, leaves, target.backend), inputs, grad_output, cotangents, order)


@pytest.mark.cases(SOME)
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e6, 1e30], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64", "bfloat16"])
def test_huge_logits_give_finite_results(any_target, case, dtype, scale):
    """The softmax saturates: one key takes all. Nothing overflows on the way, in any order."""
    any_target.skip_unless_can(dtype, case.head_dim)
    case = replace(case, scale=scale)
    results = solve(case, any_target, inputs_of(case, dtype, any_target.device))
    for name, result in results.items():
        assert result.isfinite().all(), name
    if dtype == torch.float64:
        inputs = inputs_of(case)
        true = oracle_derivatives(case, inputs, grad_output_of(case, inputs["query"]), order=0)
        torch.testing.assert_close(results["output"].cpu(), true["output"], rtol=0, atol=1e-13 * scale)


@pytest.mark.cases(SOME)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12], ids=str)
def test_inputs_of_any_size(any_target, case, size):
    """Values scale the output; their square is out of float32's range."""
    inputs = inputs_of(case, torch.float32, any_target.device)
    output = forward(case, inputs, any_target.backend)
    scaled = forward(case, inputs | {"value": inputs["value"] * size}, any_target.backend)
    torch.testing.assert_close(scaled / size, output, rtol=1e-5, atol=1e-5)
    # Tiny keys and queries: all weights equal up to the table.
    tiny = {n: t if n in ("value", "bias") else t * min(size, 1e-12) for n, t in inputs.items()}
    zero = {n: t if n in ("value", "bias") else t * 0 for n, t in inputs.items()}
    torch.testing.assert_close(
        forward(case, tiny, any_target.backend), forward(case, zero, any_target.backend), rtol=1e-5, atol=1e-5
    )


@pytest.mark.cases([case for case in SOME if case.bias])
def test_a_table_that_decides_alone(any_target, case):
    """A table entry far above the rest picks the key at that offset."""
    inputs = inputs_of(case, torch.float32, any_target.device)
    rows, columns = case.table_shape[1] // 2, case.table_shape[2] // 2
    inputs["bias"][:, rows, columns] = 1e4
    results = solve(case, any_target, inputs)
    torch.testing.assert_close(results["output"], inputs["value"])
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.cases([case for case in SOME if case.bias])
def test_a_constant_on_the_table_changes_nothing(any_target, case):
    inputs = inputs_of(case, torch.float64, any_target.device)
    shifted = solve(case, any_target, inputs | {"bias": inputs["bias"] + 100})
    for name, result in solve(case, any_target, inputs).items():
        if not name.startswith("dd_") or name != "output":
            torch.testing.assert_close(shifted[name], result, rtol=1e-9, atol=1e-9)


@pytest.mark.cases(SOME)
def test_equal_values_come_back(any_target, case):
    """Weights sum to one: a constant value is the output, and its gradient is spread without loss."""
    inputs = inputs_of(case, torch.float32, any_target.device)
    if "value" in case.tied:
        pytest.skip("values are the queries")
    inputs["value"] = torch.ones_like(inputs["value"])
    results = solve(case, any_target, inputs)
    torch.testing.assert_close(results["output"], torch.ones_like(results["output"]))
    grad_output = grad_output_of(case, inputs["query"])
    torch.testing.assert_close(
        results["d_value"].flatten(1, -3).sum(1), grad_output.flatten(1, -3).sum(1), rtol=1e-4, atol=1e-4
    )


LOCAL = [
    Case("local-grid", "grid", (1, 6, 10, 1, 8), window=(3, 5), small=True),
    Case("local-7x9", "neighborhood", (1, 7, 9, 1, 8), kernel=3, bias=True, small=True),
    # Small maps and residue classes, which some backends run as masked products of all pairs.
    Case("local-8x8", "neighborhood", (1, 8, 8, 1, 8), kernel=7, small=True),
    Case("local-16x16", "neighborhood", (1, 16, 16, 1, 4), kernel=7, dilation=2, bias=True),
    Case("local-10x13", "neighborhood", (1, 10, 13, 1, 16), kernel=3, dilation=(3, 4)),
    Case("local-21x19", "neighborhood", (1, 21, 19, 1, 8), kernel=(7, 5)),
    Case("local-5x33", "neighborhood", (1, 5, 33, 1, 8), kernel=(5, 4)),
    # Windows cut short, of groups of queries, and on three axes.
    Case("local-12-causal", "neighborhood", (1, 12, 1, 8), kernel=7, causal=True),
    Case("local-60-s5", "neighborhood", (1, 60, 1, 8), kernel=9, stride=5),
    Case("local-6x37-s3-causal", "neighborhood", (1, 6, 37, 1, 8), kernel=(3, 7), stride=(1, 3), causal=(False, True)),
    Case("local-4x5x19-causal", "neighborhood", (1, 4, 5, 19, 1, 8), kernel=3, causal=(True, False, False)),
    Case("local-6x6x18-s2", "neighborhood", (1, 6, 6, 18, 1, 4), kernel=(2, 3, 4), dilation=(2, 1, 1), stride=2),
]
LOCAL += [replace(case, score="l2") for case in LOCAL[1:3]]
OPERANDS = ["query", "key", "value", "grad_output", "cot_query", "cot_key", "cot_value"]


@pytest.mark.cases(LOCAL)
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", OPERANDS)
def test_nan_and_infinity_reach_what_sees_them_and_no_more(any_target, case, name, strange, request):
    """In every result of every order, just as in the plain formula that gathers the keys of each query."""
    if case.score == "l2" and name == "key" and not math.isnan(strange):
        pytest.skip("2 q.k - k.k is NaN or minus infinity, by the sign of q")
    if any_target.backend in LEAKS:
        request.applymarker(pytest.mark.xfail(reason="LEAKS"))
    inputs = inputs_of(case, torch.float32)
    operands = inputs | {"grad_output": grad_output_of(case, inputs["query"])}
    operands |= {f"cot_{n}": x for n, x in cotangents_of(case, inputs).items()}

    def solve_with(operands, backend, device):
        there = {n: x.to(device) for n, x in operands.items()}
        cotangents = {n.removeprefix("cot_"): there.pop(n) for n in list(there) if n.startswith("cot_")}
        grad_output = there.pop("grad_output")
        results = derivatives(lambda leaves: forward(case, leaves, backend), there, grad_output, cotangents)
        return {n: x.cpu() for n, x in results.items()}

    extents = case.shape[1:-2]
    for place in ((0,) * len(extents), (*(extent // 2 for extent in extents[:-1]), extents[-1] - 2)):
        changed = operands | {name: operands[name].clone()}
        changed[name][(0, *place, 0, 1)] = strange
        expected = solve_with(changed, "reference", "cpu")
        for label, result in solve_with(changed, any_target.backend, any_target.device).items():
            finite = expected[label].isfinite()
            assert torch.equal(result.isfinite(), finite), f"{label}: {result.isfinite().sum()}, not {finite.sum()}"
            torch.testing.assert_close(result[finite], expected[label][finite], rtol=1e-4, atol=1e-4, msg=label)


MASKS = ["lowest", "-1e31", "-inf", "lowest everywhere", "largest everywhere", "largest"]


@pytest.mark.cases([case for case in LOCAL if case.score == "dot"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_tables_that_mask(any_target, case, dtype, mask):
    """Large numbers mask (or choose) as where they are added to scores; alone in a window they all weigh alike."""
    any_target.skip_unless_can(dtype, case.head_dim)
    case = replace(case, bias=True)
    inputs = inputs_of(case, dtype)
    number = {"lowest": torch.finfo(dtype).min, "largest": torch.finfo(dtype).max}.get(mask.split()[0])
    number = float(mask) if number is None else number
    if mask.endswith("everywhere"):
        inputs["bias"].fill_(number)
    else:
        columns = case.table_shape[-1]
        lines = inputs["bias"].view(case.heads, -1, columns)  # of all planes and rows
        lines[:, lines.shape[1] // 2 + 1 :, :: 2 if columns > 3 else columns - 1] = number
    results = solve(case, any_target, {n: x.to(any_target.device) for n, x in inputs.items()})
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    true = oracle_derivatives(case, inputs, grad_output, cotangents)
    half = torch.finfo(dtype).bits == 16
    for name, result in results.items():
        # The gradient of a table is a sum over the map.
        size = max(1, float(true[name].abs().max()))
        rtol = 5e-2 if half else 1e-4
        torch.testing.assert_close(result.cpu().double(), true[name], rtol=rtol, atol=rtol * size, msg=name)


@pytest.mark.cases([find("na-7x9-k3", bias=True), find("grid-6x10-w3x5", bias=True)])
def test_a_row_of_minus_infinity_is_nan(any_target, case):
    """As in softmax: there is nothing to attend."""
    inputs = inputs_of(case, torch.float32, any_target.device)
    inputs["bias"][0] = -torch.inf
    output = forward(case, inputs, any_target.backend)
    assert output[..., 0, :].isnan().all() and output[..., 1:, :].isfinite().all()


@pytest.mark.cases([find("full-self-9"), find("na-7x9-k3", bias=True)])
def test_values_of_one_sign_stay_within_their_range(any_target, case):
    """A convex combination: never outside of the least and the largest value."""
    inputs = inputs_of(case, torch.float32, any_target.device)
    output = forward(case, inputs, any_target.backend)
    low, high = inputs["value"].min(), inputs["value"].max()
    assert (output >= low - 1e-5).all() and (output <= high + 1e-5).all()


def test_no_queries(any_target):
    """Attention of no query: an empty output, and gradients of zero for what it would have attended."""
    query = torch.zeros(2, 0, 3, 8, device=any_target.device, requires_grad=True)
    key, value = (torch.randn(2, 5, 3, 8, device=any_target.device, requires_grad=True) for _ in range(2))
    output = natten_ext.attention(query, key, value, backend=any_target.backend)
    assert output.shape == query.shape
    first = torch.autograd.grad(output.sum(), (key, value), create_graph=True)
    assert all(gradient.abs().sum() == 0 for gradient in first)


@pytest.mark.parametrize("size", [8, 12])
def test_values_outside_the_window_have_no_weight(any_target, size):
    """However large: also where a backend masks a dense product."""
    query = torch.randn(1, size, size, 1, 4, device=any_target.device)
    value = query.clone()
    value[0, -1, -1] = 3e38
    expected = natten_ext.neighborhood_attention(query, query, query, 7, backend=any_target.backend)
    output = natten_ext.neighborhood_attention(query, query, value, 7, backend=any_target.backend)
    torch.testing.assert_close(output[0, :3, :3], expected[0, :3, :3], rtol=1e-6, atol=1e-6)
