"""The kernels for short sequences in half precision: which problems they take, and that they solve these as the general
kernels do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from natten_ext.operators import OPERATORS
from tests.cuda import emulated
from tests.cuda.test_narrow import (
    DTYPES,
    all_cotangents,
    assert_alike,
    assert_every_barrier_and_every_wait_is_needed,
    assert_forward_is_that_of_the_general_kernel,
    assert_gradients_alike,
    assert_gradients_are_those_of_float64,
    both,
    double_backward,
    gradients,
    narrow_sites,
    run,
    second_gradients,
    unaligned,
)
from tests.operators.budget import assert_same_bits
from tests.operators.cases import Case, arguments_of, cotangents_of, forward, grad_output_of, inputs_of

pytestmark = [emulated.NEEDED, pytest.mark.usefixtures("h100")]

# Of gradients of queries the general kernel's, whose D lacks something at first, are the less exact ones.
ULPS = 4


def sequence(tokens: int, head_dim: int = 32, heads: int = 1, batch: int = 1, **settings) -> Case:
    return replace(Case("short", "full", (batch, tokens, heads, head_dim)), **settings)


CASES = {
    "65 tokens, l2": sequence(65, 64, heads=2, batch=2, score="l2"),
    "65 tokens": sequence(65, 64),
    "few tokens": sequence(17, 24, heads=3, score="l2"),
    "all tokens": sequence(72, 32, batch=2),
    "whole groups": sequence(64, 8, score="l2"),
    "wide": sequence(50, 72, heads=2, score="l2"),
}  # fmt: skip
SMALL = {name: CASES[name] for name in ("65 tokens, l2", "wide")}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
EACH_SMALL = pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))
BOTH_ORDERS = pytest.mark.parametrize("solve", [gradients, second_gradients], ids=["backward", "double_backward"])


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_that_of_the_general_kernel(case, dtype):
    assert_forward_is_that_of_the_general_kernel(case, dtype)


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH_ORDERS
def test_gradients_are_those_of_float64(case, dtype, solve):
    inputs = inputs_of(case, dtype)
    assert assert_gradients_are_those_of_float64(case, inputs, dtype, solve)
    results, _ = both(solve, case, inputs)
    with emulated.settings(shared_limit=emulated.H100_SHARED, order=1):
        assert_same_bits(solve(case, inputs)[0], results)


def test_keys_that_queries_equal():
    """Of tied queries and keys far from zero: the score of a pair of equal rows is zero."""
    case = sequence(65, 64, score="l2", tied=("key",))
    inputs = inputs_of(case, torch.bfloat16)
    inputs["query"] = inputs["query"].round() / 2 + 100
    results, expected = both(run, case, inputs)
    assert_alike(results, expected, torch.bfloat16)
    results, expected = both(gradients, case, inputs)
    assert_gradients_alike(results, expected, torch.bfloat16, ULPS)


@pytest.mark.parametrize("wanted", range(3))
def test_one_gradient_alone(wanted):
    case = CASES["65 tokens, l2"]
    inputs = inputs_of(case, torch.bfloat16)
    values, _ = run(case, inputs)
    arguments = [grad_output_of(case, inputs["query"]), None, *arguments_of(case, inputs)]
    arguments += [values["output"], values["lse"], case.code, True, case.effective_scale]
    expected = OPERATORS["cuda"].backward(*arguments, [True, True, True, False])
    narrow_sites()
    results = OPERATORS["cuda"].backward(*arguments, [i == wanted for i in range(4)])
    assert narrow_sites()
    assert torch.equal(results[wanted], expected[wanted])


@pytest.mark.parametrize("wanted", range(5))
def test_one_second_gradient_alone(wanted):
    case = CASES["wide"]
    inputs = inputs_of(case, torch.bfloat16)
    expected, _ = second_gradients(case, inputs)
    needs = [i == wanted or i == 3 for i in range(6)]  # with that of keys, so that it is no directional derivative
    results, short = double_backward(case, inputs, all_cotangents(case, inputs), needs)
    assert short
    name = list(expected)[wanted]
    assert torch.equal(results[name], expected[name])


def test_no_batch():
    case = sequence(65, batch=0)
    results, _ = gradients(case, inputs_of(case, torch.bfloat16))
    assert results["query"].shape == case.shape


@pytest.mark.samples(emulated=6)
@pytest.mark.parametrize("case", [CASES["65 tokens"], CASES["wide"]], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_reaches_only_what_attends_it(case, name, strange, dtype):
    inputs = inputs_of(case, dtype)
    inputs[name][0, 49, 0, 3] = strange
    results, short = run(case, inputs)
    assert short
    if case.score == "dot":
        expected = forward(case, {n: x.float() for n, x in inputs.items()}, "reference").isfinite()
        assert torch.equal(results["output"].isfinite(), expected) and (~expected).any()
    assert_alike(results, run(case, unaligned(inputs))[0], dtype)
    assert_gradients_alike(gradients(case, inputs)[0], gradients(case, unaligned(inputs))[0], dtype, ULPS)


@pytest.mark.samples(emulated=6)
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("of_cotangent", [False, True], ids=["input", "cotangent"])
@pytest.mark.parametrize("strange", [torch.nan, -torch.inf], ids=str)
def test_what_is_not_finite_reaches_second_gradients_of_what_attends_it(name, of_cotangent, strange):
    case = CASES["65 tokens, l2"]
    inputs = inputs_of(case, torch.bfloat16)
    cotangents = all_cotangents(case, inputs)
    (cotangents if of_cotangent else inputs)[name][0, 64, 0, 3] = strange
    results, short = double_backward(case, inputs, cotangents)
    assert short
    assert_gradients_alike(results, double_backward(case, unaligned(inputs), cotangents)[0], torch.bfloat16, ULPS)


def test_an_infinite_key_that_no_query_attends():
    """Gradients of values are finite, also beside queries beyond the sequence, whose product with it is NaN."""
    case = CASES["65 tokens"]
    inputs = inputs_of(case, torch.bfloat16)
    inputs["query"][..., 3] = -1
    inputs["key"][0, 40, 0, 3] = torch.inf
    for solve in (run, gradients, second_gradients):
        results, expected = both(solve, case, inputs)
        assert results["value" if "value" in results else "output"].isfinite().all() == (solve is not second_gradients)
        for name, result in results.items():
            assert torch.equal(result.isfinite(), expected[name].isfinite()), name


@EACH_SMALL
def test_tiny_weights_are_zero(case):
    """And scores may be as large as they like."""
    inputs = inputs_of(case, torch.bfloat16)
    inputs["query"] *= 100
    for solve in (run, gradients, second_gradients):
        results, expected = both(solve, case, inputs)
        if solve is run:
            assert_alike(results, expected, torch.bfloat16)
        else:
            assert_gradients_alike(results, expected, torch.bfloat16, ULPS)


@EACH_SMALL
def test_any_strides(case):
    """Slices, and heads whose rows are adjacent."""
    inputs = inputs_of(case, torch.bfloat16)
    inner = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items()}
    for solve in (run, gradients, second_gradients):
        results, short = solve(case, inner)
        assert short
        assert_same_bits(results, solve(case, inputs)[0])


@pytest.mark.parametrize(
    "change",
    [{"shape": (1, 73, 1, 32)}, {"shape": (1, 16, 1, 32)}, {"shape": (1, 65, 1, 104)}, {"shape": (1, 65, 1, 12)},
     {"keys": 64}, {"scale": -1.0}, {"scale": 0.0}],
    ids=str,
)  # fmt: skip
def test_what_the_general_kernel_takes(change):
    case = replace(sequence(65), **change)
    assert not run(case, inputs_of(case, torch.bfloat16))[1]
    assert not run(sequence(65), inputs_of(sequence(65), torch.float32))[1]
    with emulated.settings(shared_limit=16 * 1024):
        assert not run(sequence(65), inputs_of(sequence(65), torch.bfloat16))[1]


def test_what_the_general_double_backward_takes():
    """Absent cotangents, directional derivatives alone, and what has no room, although the backward has."""
    case = CASES["65 tokens, l2"]
    inputs = inputs_of(case, torch.bfloat16)
    given = cotangents_of(case, inputs)
    for name in given:
        assert not double_backward(case, inputs, {n: x for n, x in given.items() if n != name})[1]
    assert not double_backward(case, inputs, given, [True, True, False, False, False, False])[1]
    expected, short = second_gradients(case, inputs)
    assert short
    with emulated.settings(shared_limit=99 * 1024):
        assert gradients(case, inputs)[1]
        results, short = second_gradients(case, inputs)
    assert not short
    assert_gradients_alike(results, expected, torch.bfloat16, ULPS)


@pytest.mark.parametrize(
    ("solve", "count"),
    [(run, 5), (gradients, 7), (second_gradients, 9)],
    ids=["forward", "backward", "double_backward"],
)
def test_every_barrier_and_every_wait_is_needed(solve, count):
    assert_every_barrier_and_every_wait_is_needed(CASES["65 tokens, l2"], solve, count, emulated.H100_SHARED)
