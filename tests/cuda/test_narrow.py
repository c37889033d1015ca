"""The kernels for windows of 7 x 7 keys in half precision: which problems they take, and that they solve these as the
general kernels do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from natten_ext.operators import OPERATORS
from tests.cuda import emulated
from tests.operators.budget import assert_same_bits
from tests.operators.cases import (
    Case,
    Inputs,
    arguments_of,
    cotangents_of,
    forward,
    grad_output_of,
    inputs_of,
    magnitude,
    oracle_forward,
    ulp,
)

pytestmark = emulated.NEEDED

NEIGHBORHOOD = Case("narrow", "neighborhood", (1, 7, 7, 1, 8), kernel=7, bias=True)


def neighborhood(height: int, width: int, head_dim: int = 8, heads: int = 1, batch: int = 1, **settings) -> Case:
    return replace(NEIGHBORHOOD, shape=(batch, height, width, heads, head_dim), **settings)


# Tiles of 16 x 16 and their parts at borders; classes that are whole (at most 8 x 8), of two sizes.
CASES = {
    "one tile": neighborhood(16, 16, 32),
    "several tiles": neighborhood(37, 18, 16, batch=2, heads=2),
    "narrower than a block": neighborhood(19, 7, 32),
    "lower than a tile": neighborhood(9, 33, bias=False),
    "dilated": neighborhood(19, 45, 24, dilation=(2, 5)),
    "whole map": neighborhood(8, 7, 16, batch=2),
    "whole classes": neighborhood(15, 45, 32, dilation=(2, 6), heads=2),
    "whole classes without a table": neighborhood(22, 16, dilation=(3, 2), bias=False),
    "heads of all kinds": neighborhood(
        17, 18, heads=5, kernel=(7, 7, (7, 5), 3, 7), dilation=(1, 2, 1, 1, 2), groups=("kernel", "dilation")
    ),
}  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16]


def narrow_sites() -> list[str]:
    """Barriers and waits passed since it was asked last of narrow kernels, and those for grids and short sequences."""
    return [site for site in torch.ops.natten_ext_cuda.sites().split() if site.startswith(("narrow", "grid", "short"))]


def run(case: Case, inputs: Inputs) -> tuple[Inputs, list[str]]:
    """Output and both parts of the log-sum-exp, and the barriers of narrow kernels, if they took part."""
    narrow_sites()
    output, lse, natural = OPERATORS["cuda"].forward(
        *arguments_of(case, inputs), case.code, case.score == "l2", case.effective_scale, True
    )
    return {"output": output, "lse": lse, "natural": natural}, narrow_sites()


def unaligned(inputs: Inputs) -> Inputs:
    """The same numbers at addresses of 4 bytes, which the general kernel takes."""
    copies = {}
    for name, x in inputs.items():
        room = x.new_empty(x.numel() + 2)
        copies[name] = room[2:].view_as(x).copy_(x)
    return copies


def assert_alike(results: Inputs, expected: Inputs, dtype: torch.dtype) -> None:
    """The same to rounding, and NaN at the same places. The parts of the log-sum-exp may have another base."""
    allowed = {"output": ulp(magnitude([expected["output"].nan_to_num()]), dtype), "lse": 4e-6, "natural": 4e-6}
    for name, error in allowed.items():
        result, other = (r[name].double().sum(0) if name == "lse" else r[name].double() for r in (results, expected))
        assert torch.equal(result.isfinite(), other.isfinite()), name
        result, other = (x.nan_to_num(0, 0, 0) for x in (result, other))
        assert magnitude([result - other]) <= error * (1.0 if name == "output" else max(1.0, magnitude([other]))), name


@pytest.mark.samples(emulated=12)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_that_of_the_general_kernel(case, dtype):
    assert_forward_is_that_of_the_general_kernel(case, dtype)


def assert_forward_is_that_of_the_general_kernel(case: Case, dtype: torch.dtype) -> None:
    """And right."""
    inputs = inputs_of(case, dtype)
    results, expected = both(run, case, inputs)
    assert_alike(results, expected, dtype)
    output, lse = oracle_forward(case, {n: x.double() for n, x in inputs.items()}, return_lse=True)
    assert magnitude([results["output"].double() - output]) <= 3 * ulp(magnitude([output]), dtype)
    assert magnitude([results["natural"].double() - lse.movedim(-1, 1)]) <= 4e-6 * magnitude([lse])


def both(compute: Callable, case: Case, inputs: Inputs) -> tuple[Inputs, Inputs]:
    """What the narrow kernels compute, and what the general ones do."""
    results, narrow = compute(case, inputs)
    assert narrow
    expected, narrow = compute(case, unaligned(inputs))
    assert not narrow or "kernel" in case.groups
    return results, expected


def gradients(case: Case, inputs: Inputs, of_lse: bool = True) -> tuple[Inputs, list[str]]:
    """Gradients of output and, ``of_lse``, log-sum-exp, of the inputs by name, and likewise."""
    values, _ = run(case, inputs)
    grad_output = grad_output_of(case, inputs["query"])
    natural = values["natural"]
    grad_lse = torch.linspace(-1, 1, natural.numel()).view_as(natural) if of_lse else None
    narrow_sites()
    results = OPERATORS["cuda"].backward(
        grad_output, grad_lse, *arguments_of(case, inputs), values["output"], values["lse"],
        case.code, case.score == "l2", case.effective_scale, [True, True, True, case.bias],
    )  # fmt: skip
    names = ["query", "key", "value", "bias"][: 3 + case.bias]
    return dict(zip(names, results, strict=False)), narrow_sites()


def double_backward(
    case: Case, inputs: Inputs, given: Inputs, needs: list[bool] | None = None
) -> tuple[Inputs, list[str]]:
    """Results of the double backward by name, from some cotangents of the gradients, and likewise."""
    values, _ = run(case, inputs)
    natural = values["natural"]
    grad_lse = torch.linspace(-1, 1, natural.numel()).view_as(natural)
    cotangents = [given.get(name) for name in ("query", "key", "value", "bias")]
    narrow_sites()
    results = OPERATORS["cuda"].double_backward(
        *cotangents, grad_output_of(case, inputs["query"]), grad_lse, *arguments_of(case, inputs),
        values["output"], values["lse"], case.code, case.score == "l2", case.effective_scale,
        needs or [True] * 5 + [case.bias],
    )  # fmt: skip
    return dict(zip(["grad_output", "grad_lse", *inputs], results, strict=False)), narrow_sites()


def all_cotangents(case: Case, inputs: Inputs) -> Inputs:
    """But that of the table's gradient, which the narrow kernels leave to others."""
    return {n: x for n, x in cotangents_of(case, inputs).items() if n != "bias"}


def second_gradients(case: Case, inputs: Inputs) -> tuple[Inputs, list[str]]:
    return double_backward(case, inputs, all_cotangents(case, inputs))


ROOM = 163 * 1024  # bytes of shared memory, for the double backward of 32 channels
BOTH_ORDERS = pytest.mark.parametrize("solve", [gradients, second_gradients], ids=["backward", "double_backward"])


@pytest.fixture
def room():
    with emulated.settings(shared_limit=ROOM):
        yield


def assert_gradients_alike(results: Inputs, expected: Inputs, dtype: torch.dtype, ulps: int = 2) -> None:
    for name, result in results.items():
        other = expected[name]
        assert torch.equal(result.isfinite(), other.isfinite()), name
        result, other = (x.double().nan_to_num(0, 0, 0) for x in (result, other))
        assert magnitude([result - other]) <= ulps * ulp(magnitude([other]), dtype), name


@pytest.mark.samples(emulated=12)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH_ORDERS
def test_gradients_are_those_of_the_general_kernel(case, dtype, solve, room):
    inputs = inputs_of(case, dtype)
    results, expected = both(solve, case, inputs)
    assert_gradients_alike(results, expected, dtype)
    with emulated.settings(shared_limit=ROOM, table_blocks=1):  # all tiles in one block
        assert_gradients_alike(solve(case, inputs)[0], expected, dtype)


# Keys near borders are seen by more queries: axes where parts of tiles, and tiles of 16 and 32 rows, meet near one.
BORDERS = {
    "14 x 14": neighborhood(14, 14, 32),
    "20 x 22": neighborhood(20, 22, 32),
    "21 x 30": neighborhood(21, 30, 24, bias=False),
    "22 x 15": neighborhood(22, 15, 32),
    "38 x 17": neighborhood(38, 17),
    "36 x 9": neighborhood(36, 9, 16),
    "8 x 20": neighborhood(8, 20),
    "classes of 8 x 7 to 9 x 8": neighborhood(26, 31, dilation=(3, 4)),
    "whole classes of 7 x 7 to 8 x 8": neighborhood(15, 31, 16, dilation=(2, 4), heads=2),
    "heads with different dilations": neighborhood(28, 29, heads=3, dilation=(1, 4, 2), groups=("dilation",)),
}


@pytest.mark.samples(emulated=12)
@pytest.mark.parametrize("case", BORDERS.values(), ids=list(BORDERS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH_ORDERS
def test_gradients_at_borders_are_those_of_float64(case, dtype, solve, room):
    narrow = assert_gradients_are_those_of_float64(case, inputs_of(case, dtype), dtype, solve)
    assert any("narrow_keys" in site for site in narrow) and any("narrow_queries" in site for site in narrow)


def assert_gradients_are_those_of_float64(case: Case, inputs: Inputs, dtype: torch.dtype, solve: Callable) -> list[str]:
    """Returns the barriers of narrow kernels, if they took part."""
    results, narrow = solve(case, inputs)
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    output, lse = oracle_forward(case, leaves, return_lse=True)
    lse = lse.movedim(-1, 1)
    grad_lse = torch.linspace(-1, 1, lse.numel(), dtype=torch.float64).view(lse.shape).requires_grad_()
    grad_output = grad_output_of(case, inputs["query"]).double().requires_grad_()
    twice = solve is second_gradients
    expected = torch.autograd.grad([output, lse], list(leaves.values()), [grad_output, grad_lse], create_graph=twice)
    if twice:
        cotangents = [x.double() for x in all_cotangents(case, inputs).values()]
        expected = torch.autograd.grad(expected[:3], [grad_output, grad_lse, *leaves.values()], cotangents)
        assert magnitude([results["grad_lse"].double() - expected[1]]) <= 1e-6 * magnitude([expected[1]])
    for (name, result), exact in zip(results.items(), expected, strict=True):
        assert magnitude([result.double() - exact]) <= 3 * ulp(magnitude([exact]), dtype), name
    return narrow


def test_what_the_general_double_backward_takes():
    """Absent cotangents, that of a table's gradient, and directional derivatives alone."""
    case = CASES["several tiles"]
    inputs = inputs_of(case, torch.bfloat16)
    given = cotangents_of(case, inputs)
    some = [{n: x for n, x in given.items() if n != name} for name in given]
    for cotangents in [given, *some[:3]]:
        assert not double_backward(case, inputs, cotangents)[1]
    assert double_backward(case, inputs, some[3])[1]
    assert not double_backward(case, inputs, some[3], [True, True, False, False, False, False])[1]


@pytest.mark.parametrize("wanted", range(6))
def test_one_second_gradient_alone(wanted):
    case = CASES["several tiles"]
    inputs = inputs_of(case, torch.bfloat16)
    expected, _ = second_gradients(case, inputs)
    needs = [i == wanted or i == 3 for i in range(6)]  # with that of keys, so that it is no directional derivative
    results, narrow = double_backward(case, inputs, all_cotangents(case, inputs), needs)
    assert narrow
    name = list(expected)[wanted]
    assert torch.equal(results[name], expected[name])


@pytest.mark.samples(emulated=8)
@pytest.mark.parametrize("case", ["several tiles", "whole classes"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("of_cotangent", [False, True], ids=["input", "cotangent"])
@pytest.mark.parametrize("strange", [torch.nan, -torch.inf], ids=str)
def test_what_is_not_finite_reaches_second_gradients_of_what_attends_it(case, name, of_cotangent, strange, room):
    case = CASES[case]
    inputs = inputs_of(case, torch.bfloat16)
    cotangents = all_cotangents(case, inputs)
    (cotangents if of_cotangent else inputs)[name][0, 9, 11, 0, 3] = strange
    results, narrow = double_backward(case, inputs, cotangents)
    assert narrow
    expected, _ = double_backward(case, unaligned(inputs), cotangents)
    assert_gradients_alike(results, expected, torch.bfloat16)
    assert 0 < (~results["query"].isfinite()).sum() < results["query"].numel() / 4


@pytest.mark.parametrize("needs", [(False, True, False), (False, False, True)], ids=["key", "value"])
def test_one_gradient_alone(needs):
    case = CASES["several tiles"]
    inputs = inputs_of(case, torch.bfloat16)
    values, _ = run(case, inputs)
    arguments = [grad_output_of(case, inputs["query"]), None, *arguments_of(case, inputs)]
    arguments += [values["output"], values["lse"], case.code, case.score == "l2", case.effective_scale]
    expected = OPERATORS["cuda"].backward(*arguments, [True, True, True, False])
    results = OPERATORS["cuda"].backward(*arguments, [*needs, False])
    index = needs.index(True)
    assert torch.equal(results[index], expected[index])


def test_no_batch():
    case = neighborhood(16, 16, batch=0)
    inputs = inputs_of(case, torch.bfloat16)
    results, _ = gradients(case, inputs)
    assert {n: x.shape for n, x in results.items()} == {n: x.shape for n, x in inputs.items()}


SMALL = {name: CASES[name] for name in ("several tiles", "whole classes")}


@pytest.mark.samples(emulated=8)
@pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_reaches_only_what_attends_it(case, name, strange, dtype):
    inputs = inputs_of(case, dtype)
    inputs[name][0, 9, 11, 0, 3] = strange
    results, narrow = run(case, inputs)
    assert narrow
    expected = forward(case, {n: x.float() for n, x in inputs.items()}, "reference").isfinite()
    assert torch.equal(results["output"].isfinite(), expected) and 0 < (~expected).sum() < expected.numel() / 8
    assert_alike(results, run(case, unaligned(inputs))[0], dtype)
    assert_gradients_alike(gradients(case, inputs)[0], gradients(case, unaligned(inputs))[0], dtype)


@pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))
def test_tables_that_mask(case):
    """Minus infinity masks, also all keys of a query; the least number and the largest are a quarter of themselves."""
    inputs = inputs_of(case, torch.bfloat16)
    table = inputs["bias"]
    table[0, :, :5] = -torch.inf
    table[0, 7:, 4:] = torch.finfo(torch.bfloat16).min
    table[1] = -torch.inf
    table[1, 6, 6] = torch.finfo(torch.bfloat16).max
    table[1, 6, :6] = 0
    results, narrow = run(case, inputs)
    assert narrow
    assert_alike(results, run(case, unaligned(inputs))[0], torch.bfloat16)


@pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))
def test_tiny_weights_are_zero(case):
    """And scores may be as large as they like."""
    inputs = inputs_of(case, torch.bfloat16)
    inputs["query"] *= 100
    results, narrow = run(case, inputs)
    assert narrow
    assert_alike(results, run(case, unaligned(inputs))[0], torch.bfloat16)


@pytest.mark.parametrize("case", [*SMALL.values(), neighborhood(21, 7)], ids=[*SMALL, "higher than a tile, 8 channels"])
@pytest.mark.parametrize("all_queries", [False, True], ids=["some queries", "all queries"])
@BOTH_ORDERS
def test_numbers_too_large_for_the_start_of_products(case, all_queries, solve, room, monkeypatch):
    """Log-sum-exps and D that come off with care."""
    inputs = inputs_of(case, torch.float16)
    grad_output = grad_output_of(case, inputs["query"])
    if all_queries:  # where their scores would start, float16 has no numbers
        case = replace(case, scale=0.002)
        inputs["bias"] += 100
    else:
        inputs["query"][:, 5:] *= 300
        grad_output[:, 3:7] *= 10000
    monkeypatch.setattr("tests.cuda.test_narrow.grad_output_of", lambda *_: grad_output)
    results, expected = both(solve, case, inputs)
    assert_gradients_alike(results, expected, torch.float16)
    assert all(result.isfinite().any() for result in results.values())


@pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))
@pytest.mark.parametrize("carefully", [False, True], ids=["", "carefully"])
def test_gradients_of_tables_do_not_lack_what_output_lost(case, carefully):
    """Outputs are rounded at the size of what values have in common, and so is D: sums of dS tell what it lacks."""
    if carefully:  # float16 has no numbers for where the scores would start
        case = replace(case, scale=0.002)

    def error(mean):
        inputs = inputs_of(case, torch.float16)
        inputs["value"] += mean
        inputs["bias"] = inputs["bias"].float() + 100 * carefully
        results, narrow = gradients(case, inputs, of_lse=False)
        assert narrow
        exact, _ = gradients(case, {name: x.double() for name, x in inputs.items()}, of_lse=False)
        return ((results["bias"] - exact["bias"]).square().mean() / exact["bias"].square().mean()).sqrt()

    assert error(10) < 2 * error(0)


@pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))
def test_bits_do_not_depend_on_the_order_of_warps(case):
    inputs = inputs_of(case, torch.bfloat16)
    ascending, _ = run(case, inputs)
    with emulated.settings(order=1):
        assert_same_bits(run(case, inputs)[0], ascending)


@pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))
def test_any_strides(case):
    """Slices, a map that begins elsewhere, and a table in float32; negative strides are the general kernel's."""
    inputs = inputs_of(case, torch.bfloat16)
    expected, _ = run(case, inputs)
    inner = {n: x.transpose(1, 3).contiguous().transpose(1, 3) for n, x in inputs.items() if n != "bias"}
    results, narrow = run(case, inner | {"bias": inputs["bias"].float().mT.contiguous().mT})
    assert narrow
    assert_same_bits(results, expected)


@pytest.mark.parametrize(
    "change", [{"kernel": (7, 5)}, {"kernel": 8}, {"score": "l2"}, {"shape": (1, 12, 17, 1, 40)}], ids=str
)
def test_what_the_general_kernel_takes(change):
    case = replace(neighborhood(12, 17), **change)
    _, narrow = run(case, inputs_of(case, torch.bfloat16))
    assert not narrow
    with emulated.settings(shared_limit=32 * 1024):
        _, narrow = run(neighborhood(12, 17, 32), inputs_of(neighborhood(12, 17, 32), torch.bfloat16))
    assert not narrow


@pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))
@pytest.mark.parametrize(
    ("solve", "count"),
    [(run, 4), (gradients, 7), (second_gradients, 7)],
    ids=["forward", "backward", "double_backward"],
)
def test_every_barrier_and_every_wait_is_needed(case, solve, count):
    assert_every_barrier_and_every_wait_is_needed(case, solve, count, ROOM)


def assert_every_barrier_and_every_wait_is_needed(case: Case, solve: Callable, count: int, room: int) -> None:
    """Of at least ``count``, with ``room`` bytes of shared memory; one block has all the work of a head."""
    inputs = inputs_of(case, torch.bfloat16)

    def solved(dropped_site: str = "") -> tuple[Inputs, list[str]]:
        with emulated.settings(dropped_site=dropped_site, table_blocks=1, shared_limit=room):
            return solve(case, inputs)

    expected, sites = solved()
    assert len(sites) >= count, sites

    def goes_unnoticed(site: str) -> bool:
        try:
            assert_same_bits(solved(site)[0], expected)
        except (RuntimeError, AssertionError):
            return False
        return True

    assert not [site for site in sites if goes_unnoticed(site)]
