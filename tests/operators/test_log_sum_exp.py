"""The log-sum-exp as a result (`return_lse=True`): its value and all derivatives, with those of the output and alone.

Most tests take output and log-sum-exp for one tensor with a channel more, so that what tests an output tests both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

from tests.operators.budget import assert_equal_to_rounding, largest_error
from tests.operators.cases import (
    CASES,
    ONE_OF_EACH,
    TINY,
    Case,
    Inputs,
    arguments_of,
    cotangents_of,
    derivatives,
    find,
    forward,
    inputs_of,
    magnitude,
    nonempty_subsets,
    on,
    oracle_forward,
    random,
)
from tests.operators.test_forward_mode import SOME, second_order, tangent_of
from tests.operators.test_third_derivatives import check_what_the_third_order_has, second_derivatives
from tests.operators.test_transforms import close, transforms

# Rows of several blocks of keys that are kept in the cache, and of more than are kept.
LONG = [
    Case("lse-kept", "full", (1, 40, 1, 4), keys=300),
    Case("lse-long", "full", (1, 20, 2, 3), keys=2500),
]
SIZES = [case for case in CASES if case.head_dim <= 33 and not case.tied]
PARTS = ("both", "output", "lse")


def part_of(attend: Callable[..., tuple[Tensor, Tensor]], case: Case, part: str) -> Callable[[Inputs], Tensor]:
    def function(inputs: Inputs) -> Tensor:
        output, lse = attend(case, inputs, return_lse=True)
        if part == "both":
            return torch.cat([output, lse.unsqueeze(-1)], -1)
        # It does not depend on the values, of which a gradient is asked for.
        return output if part == "output" else lse + 0 * arguments_of(case, inputs)[2].sum()

    return function


def fused(case: Case, backend: str, part: str = "both") -> Callable[[Inputs], Tensor]:
    return part_of(partial(forward, backend=backend), case, part)


def true(case: Case, part: str = "both") -> Callable[[Inputs], Tensor]:
    return part_of(oracle_forward, case, part)


def gradient_of(case: Case, inputs: Inputs, part: str = "both") -> Tensor:
    """A random gradient of the results."""
    shapes = {"output": case.shape, "lse": case.shape[:-1], "both": (*case.shape[:-1], case.head_dim + 1)}
    return random(case, f"gradient of {part}", shapes[part], torch.float64, str(inputs["query"].device))


def compare(target, case: Case, inputs: Inputs, part: str = "both", tolerance: float = 1e-12) -> None:
    """Value, first and second derivatives."""
    y, cotangents = gradient_of(case, inputs, part), cotangents_of(case, inputs)
    there = on(target, inputs), y.to(target.device), on(target, cotangents)
    results = derivatives(fused(case, target.backend, part), *there)
    assert_equal_to_rounding(results, derivatives(true(case, part), inputs, y, cotangents), tolerance)


@pytest.mark.cases(SIZES)
def test_value_first_and_second_derivatives(any_target, case):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    compare(any_target, case, inputs_of(case))


@pytest.mark.cases([ONE_OF_EACH[0], ONE_OF_EACH[2]])
def test_a_score_of_infinity_is_nan(any_target, case):
    """As in the output: in the rows that see it, and no other. A score of minus infinity is a masked key."""
    inputs = on(any_target, inputs_of(case, torch.float32))
    inputs["query"] = inputs["query"].abs()
    inputs["key"][0].flatten(0, -3)[1] = torch.inf
    output, lse = forward(case, inputs, any_target.backend, return_lse=True)
    assert torch.equal(lse.isnan(), output.isnan().any(-1))
    assert 0 < lse.isnan().sum() < lse.numel()
    _, lse = forward(case, inputs | {"query": -inputs["query"]}, any_target.backend, return_lse=True)
    assert lse.isfinite().all()


@pytest.mark.cases([*TINY, *ONE_OF_EACH, find("full-self-9", tied=("key", "value"), score="l2")])
@pytest.mark.parametrize("part", ["output", "lse"])
def test_one_of_them_alone(any_target, case, part):
    """The one that is not used has no gradient."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    compare(any_target, case, inputs_of(case), part)


@pytest.mark.cases([replace(case, score=score) for case in LONG for score in ("dot", "l2")])
def test_long_rows(target, case):
    target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    compare(target, case, inputs)
    tangents = cotangents_of(case, inputs)
    result = tangent_of(fused(case, target.backend), on(target, inputs), on(target, tangents))
    assert_equal_to_rounding({"t": result}, {"t": true_tangent(case, inputs, tangents)}, 1e-12)


def true_tangent(case: Case, inputs: Inputs, tangents: Inputs) -> Tensor:
    """J t by reverse mode twice, as in test_forward_mode.py."""
    return derivatives(true(case), inputs, 0 * gradient_of(case, inputs), tangents)["dd_grad_output"]


@pytest.mark.cases(SOME)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tangents_of_every_subset_of_inputs(any_target, case, requires_grad):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    tangents = cotangents_of(case, inputs)
    for names in nonempty_subsets(inputs)[:: 4 if any_target.slow else 1]:
        given = {name: tangents[name] for name in names}
        there = {n: x.requires_grad_(requires_grad) for n, x in on(any_target, inputs).items()}
        result = tangent_of(fused(case, any_target.backend), there, on(any_target, given))
        assert result.requires_grad == requires_grad
        assert_equal_to_rounding({"t": result.detach()}, {"t": true_tangent(case, inputs, given)}, 1e-12)


@pytest.mark.cases([ONE_OF_EACH[0], ONE_OF_EACH[2]])
def test_it_does_not_depend_on_values(any_target, case):
    """It requires a gradient, and has a tangent, where an input does that it depends on."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    tangents = cotangents_of(case, inputs)
    for names in nonempty_subsets(inputs):
        there = {n: x.requires_grad_(n in names) for n, x in on(any_target, inputs).items()}
        output, lse = forward(case, there, any_target.backend, return_lse=True)
        assert output.requires_grad and lse.requires_grad == (names != ("value",)), names
    there = {n: x.requires_grad_(n == "value") for n, x in on(any_target, inputs).items()}
    for name in inputs:
        one = {name: tangents[name]}
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(there[name], on(any_target, one)[name])
            _, lse = forward(case, there | {name: dual}, any_target.backend, return_lse=True)
            tangent = forward_ad.unpack_dual(lse).tangent
        if name == "value":
            assert tangent is None or not tangent.any()
        else:
            expected = true_tangent(case, inputs, one)[..., -1]
            assert_equal_to_rounding({"t": tangent.detach()}, {"t": expected}, 1e-12)


@pytest.mark.cases(SOME)
@pytest.mark.parametrize("part", PARTS)
def test_reverse_over_forward(any_target, case, part):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    tangents, y = cotangents_of(case, inputs), gradient_of(case, inputs, part)
    leaves = {n: x.clone().requires_grad_() for n, x in on(any_target, inputs).items()}
    weights = y.to(any_target.device).requires_grad_()
    slope = (tangent_of(fused(case, any_target.backend, part), leaves, on(any_target, tangents)) * weights).sum()
    grads = torch.autograd.grad(slope, [*leaves.values(), weights], materialize_grads=True)
    expected = second_order(true(case, part), inputs, y.detach(), tangents)
    results = dict(zip([*(f"in {n}" for n in leaves), "in y"], grads, strict=True))
    assert_equal_to_rounding(results, {name: expected[name] for name in results}, 1e-12)


@pytest.mark.cases(SOME)
@pytest.mark.parametrize("part", PARTS)
def test_forward_over_reverse(any_target, case, part):
    """Along the inputs and along the gradient."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    tangents, y = cotangents_of(case, inputs), gradient_of(case, inputs, part)
    s = y.flip(0, -1)
    there = {n: x.clone().requires_grad_() for n, x in on(any_target, inputs).items()}
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(x, tangents[n].to(x.device)) for n, x in there.items()}
        weights = forward_ad.make_dual(y.to(any_target.device), s.to(any_target.device))
        result = fused(case, any_target.backend, part)(duals)
        grads = torch.autograd.grad(result, list(duals.values()), weights)
        results = {n: forward_ad.unpack_dual(g).tangent for n, g in zip(inputs, grads, strict=True)}
    by_inputs = second_order(true(case, part), inputs, y, tangents)
    by_y = derivatives(true(case, part), inputs, s, order=1)
    assert_equal_to_rounding(results, {n: by_inputs[f"in {n}"] + by_y[f"d_{n}"] for n in inputs}, 1e-12)


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(TINY)
@pytest.mark.parametrize("part", PARTS)
def test_numerical_derivatives(any_target, case, part):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case, torch.float64, any_target.device)

    def function(*tensors: Tensor) -> Tensor:
        return fused(case, any_target.backend, part)(dict(zip(inputs, tensors, strict=True)))

    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


SMALL = [find("full-tiny-cross", score="l2"), *(case for case in TINY if case.bias)]


def function_of(case: Case, names: list[str], backend: str) -> Callable[..., Tensor]:
    return lambda *tensors: fused(case, backend)(dict(zip(names, tensors, strict=True)))


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(SMALL)
@pytest.mark.parametrize("name", ["jvp", "jacrev", "jacfwd", "hessian", "grad of grad", "grad of jvp", "jvp of grad"])
def test_transforms(target, case, name):
    target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case, device=target.device)
    tensors, tangents = list(inputs.values()), list(cotangents_of(case, inputs).values())
    results = (
        transforms(function_of(case, list(inputs), b), tensors, tangents, gradient_of(case, inputs), 0)[name]()
        for b in (target.backend, "reference")
    )
    close(*results)


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(SMALL)
@pytest.mark.parametrize("dim", [0, -1])
def test_vmap(target, case, dim):
    """Of the results and, by sample, of their gradients, over every subset of inputs."""
    target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case, device=target.device)
    y = gradient_of(case, inputs)
    attend = function_of(case, list(inputs), target.backend)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda *x: (attend(*x) * y).sin().sum(), tuple(range(len(tensors))))(*tensors)

    for names in nonempty_subsets(inputs)[:: -3 if target.slow else 1]:
        stacked = [torch.stack([x, 2 * x, x - 1], dim) if n in names else x for n, x in inputs.items()]
        dims = tuple(dim if n in names else None for n in inputs)
        result, slopes = vmap(attend, dims)(*stacked), vmap(gradients, dims)(*stacked)
        for i in range(3):
            one = [x.select(dim, i) if n in names else x for n, x in zip(inputs, stacked, strict=True)]
            close(result[i], attend(*one))
            close([s[i] for s in slopes], gradients(*one))


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(ONE_OF_EACH)
def test_third_derivatives(target, case):
    """Refused, but for what is linear: in the cotangents, and of the derivatives by the incoming gradient."""
    target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    y, cotangents = gradient_of(case, inputs), cotangents_of(case, inputs)
    attend = fused(case, target.backend)
    second, sources = second_derivatives(attend, on(target, inputs), y.to(target.device), on(target, cotangents))
    for source in (n for n in sources if not n.startswith("cot")):
        with pytest.raises(RuntimeError, match="third"):
            torch.autograd.grad(second["key"].sum(), sources[source], allow_unused=True, retain_graph=True)
    check_what_the_third_order_has(target, attend, true(case), inputs, y, cotangents)


@pytest.mark.cases([ONE_OF_EACH[0], ONE_OF_EACH[3]])
@pytest.mark.parametrize("name", ["penalty", "grad of jvp"])
def test_compiled(target, case, name):
    target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case, device=target.device)
    y, tangents = gradient_of(case, inputs), tuple(cotangents_of(case, inputs).values())

    def of(backend: str):
        def loss(*x: Tensor) -> Tensor:
            return (function_of(case, list(inputs), backend)(*x) * y).sin().sum()

        if name == "penalty":
            return grad(lambda *x: grad(loss)(*x).square().sum(), 1)
        return grad(lambda *x: jvp(loss, x, tangents)[1])

    torch._dynamo.reset()
    compiled = torch.compile(of(target.backend), fullgraph=True, backend="aot_eager")
    close(compiled(*inputs.values()), of("reference")(*inputs.values()))


@pytest.mark.cases([replace(case, score=score) for case in ONE_OF_EACH for score in ("dot", "l2")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_keys_far_from_zero(any_target, case, dtype):
    """For l2 queries as well, which moves no distance."""
    any_target.skip_unless_can(dtype, case.head_dim)
    case = replace(case, scale=0.01)
    shift = 1000 if dtype != torch.bfloat16 else 8
    inputs = inputs_of(case, dtype)
    for name in ("query", "key") if case.score == "l2" else ("key",):
        inputs[name] = inputs[name] + shift
    wide = {n: x.double() for n, x in inputs.items()}
    y, cotangents = gradient_of(case, inputs), cotangents_of(case, wide)
    if dtype != torch.float64:
        y, cotangents = y.to(dtype).double(), {n: x.to(dtype).double() for n, x in cotangents.items()}
    expected = derivatives(true(case), wide, y, cotangents)
    there = [{n: x.to(dtype).to(any_target.device) for n, x in tensors.items()} for tensors in (inputs, cotangents)]
    output, lse = forward(case, there[0], any_target.backend, return_lse=True)
    assert (output.dtype, lse.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    units = 16 * torch.finfo(lse.dtype).eps
    true_lse = expected["output"][..., -1]
    assert largest_error(lse, true_lse) <= units * max(1.0, magnitude([true_lse]))
    if dtype == torch.bfloat16:  # the tests put results of two dtypes into one tensor
        return
    results = derivatives(fused(case, any_target.backend), there[0], y.to(dtype).to(any_target.device), there[1])
    plain = derivatives(true(case), inputs, y.to(dtype), there[1])
    for name, x in expected.items():
        allowed = 3 * largest_error(plain[name], x) if dtype == torch.float32 else 1e-10
        units = 8 * torch.finfo(dtype).eps * magnitude([x])
        assert largest_error(results[name], x) <= allowed + units, name


@pytest.mark.cases([replace(case, shape=(0, *case.shape[1:])) for case in ONE_OF_EACH])
def test_an_empty_batch(any_target, case):
    compare(any_target, case, inputs_of(case))


# The last one's keys are more than half of its map, which the cpu kernels take for masked full attention.
@pytest.mark.cases([*ONE_OF_EACH[2:], Case("lse-masked", "neighborhood", (1, 6, 6, 2, 8), kernel=5)])
def test_nan_in_a_gradient_reaches_what_its_query_sees(target, case):
    if target.backend == "triton":
        pytest.skip("NaN reaches others in a tile")
    leaves = {n: x.requires_grad_() for n, x in inputs_of(case, torch.float32, target.device).items()}
    _, lse = forward(case, leaves, target.backend, return_lse=True)
    y = torch.zeros_like(lse)
    y[0, 1, 1, 0] = torch.nan
    query, key = torch.autograd.grad(lse, [leaves["query"], leaves["key"]], y)
    sees = torch.zeros(case.shape[1] * case.shape[2], dtype=torch.bool)
    sees[[k for k, _ in case.neighbors[0][case.shape[2] + 1]]] = True
    assert torch.equal(key.isnan().any(-1)[0, :, :, 0].flatten().cpu(), sees)
    assert query.isnan().any(-1).sum() == 1 and query[0, 1, 1, 0].isnan().all()


@pytest.mark.samples(interpreted=0)
@pytest.mark.cases(ONE_OF_EACH)
def test_values_do_not_count_in_what_is_made_of_it_alone(any_target, case):
    leaves = {n: x.requires_grad_() for n, x in inputs_of(case, torch.float32, any_target.device).items()}
    scores = [x for n, x in leaves.items() if n != "value"]
    found = []
    for value in (leaves["value"], torch.full_like(leaves["value"], torch.nan)):
        _, lse = forward(case, leaves | {"value": value}, any_target.backend, return_lse=True)
        first = torch.autograd.grad(lse.square().sum(), scores, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), scores)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.cases(ONE_OF_EACH[1:3])
def test_a_row_without_keys_is_minus_infinity(any_target, case):
    inputs = inputs_of(case, torch.float32, any_target.device)
    inputs["bias"][0] = -torch.inf
    output, lse = forward(case, inputs, any_target.backend, return_lse=True)
    assert (lse[..., 0] == -torch.inf).all() and lse[..., 1:].isfinite().all() and output[..., 0, :].isnan().all()


def test_autocast(any_target):
    any_target.skip_unless_can(torch.bfloat16)
    case = find("na-7x9-k3", bias=True)
    inputs = inputs_of(case, torch.float32, any_target.device)
    with torch.autocast(any_target.device, dtype=torch.bfloat16):
        output, lse = forward(case, inputs, any_target.backend, return_lse=True)
    half = inputs | {n: inputs[n].bfloat16() for n in ("query", "key", "value")}
    expected = forward(case, half, any_target.backend, return_lse=True)
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(output, expected[0]) and torch.equal(lse, expected[1])
