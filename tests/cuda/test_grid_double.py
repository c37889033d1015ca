"""The kernels for the double backward of grids of 16 x 16 windows in half precision: which problems they take, and
that they solve these as the general kernels do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cuda import emulated
from tests.cuda.test_grid import grid
from tests.cuda.test_narrow import (
    DTYPES,
    all_cotangents,
    assert_every_barrier_and_every_wait_is_needed,
    assert_gradients_alike,
    both,
    double_backward,
    second_gradients,
    unaligned,
)
from tests.operators.budget import assert_same_bits
from tests.operators.cases import cotangents_of, inputs_of

pytestmark = [emulated.NEEDED, pytest.mark.usefixtures("h100")]


CASES = {
    "one window": grid(16, 16, 72),
    "wide": grid(16, 16, 96, bias=False),
    "several windows": grid(32, 16, 16, batch=2, heads=2),
    "half a chunk": grid(16, 32, 4, heads=3),
    "padded": grid(16, 16, 56),
}  # fmt: skip
SMALL = CASES["several windows"]


@pytest.mark.samples(emulated=6)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_gradients_are_those_of_the_general_kernel(case, dtype):
    results, expected = both(second_gradients, case, inputs_of(case, dtype))
    assert_gradients_alike(results, expected, dtype)


@pytest.mark.parametrize("case", [SMALL, CASES["half a chunk"]], ids=str)
def test_all_windows_in_one_block(case):
    """The same bits, but of the table's gradient, which is summed in another order."""
    inputs = inputs_of(case, torch.bfloat16)
    expected, _ = second_gradients(case, inputs)
    with emulated.settings(shared_limit=emulated.H100_SHARED, order=1, table_blocks=1):
        results, _ = second_gradients(case, inputs)
    assert_gradients_alike(results, expected, torch.bfloat16)
    results.pop("bias"), expected.pop("bias")
    assert_same_bits(results, expected)


def test_what_the_general_kernel_takes():
    """Absent cotangents, that of a table's gradient, directional derivatives alone; and little shared memory."""
    inputs = inputs_of(SMALL, torch.bfloat16)
    given = cotangents_of(SMALL, inputs)
    some = [{n: x for n, x in given.items() if n != name} for name in given]
    for cotangents in [given, *some[:3]]:
        assert not double_backward(SMALL, inputs, cotangents)[1]
    assert not double_backward(SMALL, inputs, some[3], [True, True, False, False, False, False])[1]
    with emulated.settings(shared_limit=64 * 1024):
        assert not second_gradients(SMALL, inputs)[1]
    for case in (replace(SMALL, window=8), grid(16, 16, 104)):
        assert not second_gradients(case, inputs_of(case, torch.bfloat16))[1]


@pytest.mark.parametrize("wanted", range(6))
def test_one_second_gradient_alone(wanted):
    inputs = inputs_of(SMALL, torch.bfloat16)
    expected, _ = second_gradients(SMALL, inputs)
    needs = [i in (wanted, 5) for i in range(6)]  # with that of the table, so that it is no directional derivative
    results, taken = double_backward(SMALL, inputs, all_cotangents(SMALL, inputs), needs)
    assert taken
    name = list(expected)[wanted]
    assert torch.equal(results[name], expected[name])


def test_no_batch():
    case = replace(SMALL, shape=(0, *SMALL.shape[1:]))
    results, _ = second_gradients(case, inputs_of(case, torch.bfloat16))
    assert results["query"].shape == case.shape


@pytest.mark.samples(emulated=5)
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("of_cotangent", [False, True], ids=["input", "cotangent"])
@pytest.mark.parametrize("strange", [torch.nan, -torch.inf], ids=str)
@pytest.mark.parametrize("case", [SMALL, grid(32, 16, 40)], ids=["several windows", "padded"])
def test_what_is_not_finite_reaches_only_what_attends_it(case, name, of_cotangent, strange):
    inputs = inputs_of(case, torch.bfloat16)
    cotangents = all_cotangents(case, inputs)
    (cotangents if of_cotangent else inputs)[name][0, 9, 11, 0, 3] = strange
    results, taken = double_backward(case, inputs, cotangents)
    assert taken
    expected, _ = double_backward(case, unaligned(inputs), cotangents)
    assert_gradients_alike(results, expected, torch.bfloat16)
    assert 0 < (~results["query"].isfinite()).sum() <= results["query"].numel() / 2


def test_tables_that_mask_and_tiny_weights():
    """Minus infinity masks; weights of scores as large as these are zero or one."""
    inputs = inputs_of(SMALL, torch.bfloat16)
    inputs["query"] *= 100
    inputs["bias"][0, :, :9] = -torch.inf
    inputs["bias"][1, 17:, 6:] = torch.finfo(torch.bfloat16).min
    results, expected = both(second_gradients, SMALL, inputs)
    assert_gradients_alike(results, expected, torch.bfloat16)


def test_outputs_that_lost_digits():
    """Outputs are rounded at the size of what values have in common, and so is D: sums of dS tell what it lacks."""
    inputs = inputs_of(SMALL, torch.float16)
    inputs["value"] += 100
    results, expected = both(second_gradients, SMALL, inputs)
    assert_gradients_alike(results, expected, torch.float16)


def test_gradients_of_tables_in_float32_have_their_digits():
    inputs = inputs_of(SMALL, torch.bfloat16)
    inputs["bias"] = inputs["bias"].float()
    results, expected = both(second_gradients, SMALL, inputs)
    error = (results["bias"] - expected["bias"]).square().mean() / expected["bias"].square().mean()
    assert error.sqrt() <= 1e-5


def test_every_barrier_and_every_wait_is_needed():
    assert_every_barrier_and_every_wait_is_needed(grid(16, 32), second_gradients, 7, emulated.H100_SHARED)
