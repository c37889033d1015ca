"""The kernels for grids of 16 x 16 windows in half precision: which problems they take, and that they solve these as
the general kernels do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from natten_ext.operators import OPERATORS
from tests.cuda import emulated
from tests.cuda.test_narrow import (
    DTYPES,
    assert_alike,
    assert_every_barrier_and_every_wait_is_needed,
    assert_forward_is_that_of_the_general_kernel,
    assert_gradients_alike,
    both,
    gradients,
    narrow_sites,
    run,
    unaligned,
)
from tests.operators.budget import assert_same_bits
from tests.operators.cases import (
    Case,
    arguments_of,
    forward,
    grad_output_of,
    inputs_of,
)

pytestmark = [emulated.NEEDED, pytest.mark.usefixtures("h100")]


def grid(height: int, width: int, head_dim: int = 8, heads: int = 1, batch: int = 1, **settings) -> Case:
    case = Case("grid", "grid", (batch, height, width, heads, head_dim), window=16, bias=True)
    return replace(case, **settings)


CASES = {
    "one window": grid(16, 16, 24),
    "several windows": grid(32, 16, 16, batch=2, heads=2),
    "without a table": grid(32, 32, bias=False),
    "half a chunk": grid(16, 32, 4, heads=3),
    "wide": grid(32, 16, 64, heads=2),
    "of a discriminator": grid(16, 32, 72),
    "widest": grid(16, 16, 96, bias=False),
}  # fmt: skip
SMALL = {name: CASES[name] for name in ("several windows", "half a chunk", "wide")}
# Of the backward of 8 channels, of 16, and of more.
EACH_BACKWARD = pytest.mark.parametrize(
    "case",
    [grid(16, 32, heads=2), CASES["several windows"], CASES["of a discriminator"]],
    ids=["8 channels", "16 channels", "72 channels"],
)
EACH = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
EACH_SMALL = pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))


@pytest.mark.samples(emulated=6)
@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_that_of_the_general_kernel(case, dtype):
    assert_forward_is_that_of_the_general_kernel(case, dtype)


@pytest.mark.samples(emulated=6)
@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_general_kernel(case, dtype):
    """With a gradient of the log-sum-exp, each from its own forward."""
    results, expected = both(gradients, case, inputs_of(case, dtype))
    assert_gradients_alike(results, expected, dtype)


@EACH_BACKWARD
def test_gradients_of_tables_have_no_limit_of_float16(case, monkeypatch):
    """Others do: what dS sums to is beyond float16's numbers."""
    inputs = inputs_of(case, torch.float16)
    inputs["bias"] = inputs["bias"].float()
    inputs["value"] *= 30
    grad_output = grad_output_of(case, inputs["query"]) * 10000
    monkeypatch.setattr("tests.cuda.test_narrow.grad_output_of", lambda *_: grad_output)
    results, expected = both(gradients, case, inputs)
    assert not results["query"].isfinite().all()
    difference = (results["bias"].double() - expected["bias"].double()).abs().max()
    assert difference <= 1e-3 * expected["bias"].abs().max()


@pytest.mark.parametrize(
    "case", [CASES["without a table"], grid(32, 32, 16, heads=2), grid(16, 32, 80, batch=2)], ids=str
)
def test_gradients_of_all_windows_in_one_block(case):
    """The same bits, but of the table's gradient, which is summed in another order."""
    inputs = inputs_of(case, torch.bfloat16)
    expected, _ = gradients(case, inputs)
    with emulated.settings(shared_limit=emulated.H100_SHARED, order=1, table_blocks=1):
        results, _ = gradients(case, inputs)
    assert_gradients_alike(results, expected, torch.bfloat16)
    names = ("query", "key", "value")
    assert_same_bits({n: results[n] for n in names}, {n: expected[n] for n in names})


@EACH_BACKWARD
@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone(case, wanted):
    inputs = inputs_of(case, torch.bfloat16)
    values, _ = run(case, inputs)
    arguments = [grad_output_of(case, inputs["query"]), None, *arguments_of(case, inputs)]
    arguments += [values["output"], values["lse"], case.code, False, case.effective_scale]
    expected = OPERATORS["cuda"].backward(*arguments, [True] * 4)
    narrow_sites()
    results = OPERATORS["cuda"].backward(*arguments, [i == wanted for i in range(4)])
    assert narrow_sites()
    assert torch.equal(results[wanted], expected[wanted])


@EACH_BACKWARD
def test_gradients_of_tables_in_float32_have_their_digits(case):
    """dS is rounded for products, but the table's sums are not of what is left then."""
    inputs = inputs_of(case, torch.bfloat16)
    inputs["bias"] = inputs["bias"].float()
    results, expected = both(gradients, case, inputs)
    error = (results["bias"] - expected["bias"]).square().mean() / expected["bias"].square().mean()
    assert error.sqrt() <= 1e-3  # the general kernel's own; of rounded dS 2e-3


@EACH_BACKWARD
def test_gradients_of_keys_do_not_lack_what_output_lost(case):
    """Outputs are rounded at the size of what values have in common, and so is D: sums of dS tell what it lacks."""
    inputs = inputs_of(case, torch.float16)
    inputs["value"] += 100
    results, expected = both(gradients, case, inputs)
    assert_gradients_alike({"key": results["key"]}, expected, torch.float16)


def test_gradients_of_queries_do_not_get_what_keys_have_in_common():
    case = CASES["of a discriminator"]
    inputs = inputs_of(case, torch.bfloat16)
    inputs["key"] += 100
    of_output = partial(gradients, of_lse=False)  # the log-sum-exp's, the keys themselves, would hide the others
    results, expected = both(of_output, case, inputs)
    exact, _ = of_output(case, {name: x.double() for name, x in inputs.items()})
    new, general = ((each["query"] - exact["query"]).square().mean().sqrt() for each in (results, expected))
    assert new < 1.5 * general


def test_no_batch():
    case = grid(16, 16, batch=0)
    results, _ = gradients(case, inputs_of(case, torch.bfloat16))
    assert results["query"].shape == case.shape


def test_more_heads_than_a_launch_has():
    case = grid(16, 16, 4, heads=50)
    inputs = inputs_of(case, torch.bfloat16)
    results, narrow = run(case, inputs)
    assert narrow
    alone = replace(case, shape=(1, 16, 16, 1, 4))
    last, _ = run(alone, {n: x[-1:] if n == "bias" else x[..., -1:, :] for n, x in inputs.items()})
    assert_same_bits({"output": results["output"][..., -1:, :]}, {"output": last["output"]})


@pytest.mark.samples(emulated=6)
@EACH_SMALL
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_reaches_only_what_attends_it(case, name, strange, dtype):
    inputs = inputs_of(case, dtype)
    inputs[name][0, 9, 11, 1, 3] = strange
    results, narrow = run(case, inputs)
    assert narrow
    expected = forward(case, {n: x.float() for n, x in inputs.items()}, "reference").isfinite()
    assert torch.equal(results["output"].isfinite(), expected) and 0 < (~expected).sum() <= expected.numel() / 4
    assert_alike(results, run(case, unaligned(inputs))[0], dtype)
    assert_gradients_alike(gradients(case, inputs)[0], gradients(case, unaligned(inputs))[0], dtype)


@EACH_SMALL
def test_tables_that_mask(case):
    """Minus infinity masks, also all keys of a query; the least number and the largest are a quarter of themselves."""
    inputs = inputs_of(case, torch.bfloat16)
    table = inputs["bias"]
    table[0, :, :9] = -torch.inf
    table[0, 17:, 6:] = torch.finfo(torch.bfloat16).min
    table[1] = -torch.inf
    table[1, 15, 15] = torch.finfo(torch.bfloat16).max
    table[1, 15, :11] = 0
    results, narrow = run(case, inputs)
    assert narrow
    assert_alike(results, run(case, unaligned(inputs))[0], torch.bfloat16)
    table[1] = -torch.inf
    assert_alike(run(case, inputs)[0], run(case, unaligned(inputs))[0], torch.bfloat16)


@EACH_SMALL
def test_tiny_weights_are_zero(case):
    """And scores may be as large as they like."""
    inputs = inputs_of(case, torch.bfloat16)
    inputs["query"] *= 100
    results, narrow = run(case, inputs)
    assert narrow
    assert_alike(results, run(case, unaligned(inputs))[0], torch.bfloat16)
    assert_gradients_alike(gradients(case, inputs)[0], gradients(case, unaligned(inputs))[0], torch.bfloat16)


@EACH_SMALL
def test_any_strides_and_any_order_of_warps(case):
    """Slices, a map that begins elsewhere, a table in float32 that lies the other way round; one block for all."""
    inputs = inputs_of(case, torch.bfloat16)
    expected, _ = run(case, inputs)
    inner = {n: x.transpose(1, 3).contiguous().transpose(1, 3) for n, x in inputs.items() if n != "bias"}
    with emulated.settings(shared_limit=emulated.H100_SHARED, order=1, table_blocks=1):
        results, narrow = run(case, inner | {"bias": inputs["bias"].float().mT.contiguous().mT})
    assert narrow
    assert_same_bits(results, expected)


@pytest.mark.parametrize(
    "change", [{"window": (16, 8)}, {"window": 32}, {"score": "l2"}, {"shape": (1, 32, 32, 1, 12)}], ids=str
)
def test_what_the_general_kernel_takes(change):
    case = replace(grid(32, 32), **change)
    assert not run(case, inputs_of(case, torch.bfloat16))[1]
    with emulated.settings(shared_limit=16 * 1024):
        assert not run(grid(16, 16), inputs_of(grid(16, 16), torch.bfloat16))[1]


@pytest.mark.parametrize(
    ("head_dim", "solve", "count"),
    [(16, run, 5), (8, gradients, 4), (16, gradients, 4), (72, gradients, 8)],
    ids=["forward", "backward of 8 channels", "of 16", "of 72"],
)
def test_every_barrier_and_every_wait_is_needed(head_dim, solve, count):
    assert_every_barrier_and_every_wait_is_needed(grid(16, 32, head_dim), solve, count, emulated.H100_SHARED)
