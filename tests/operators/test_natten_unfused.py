"""NATTEN's unfused functions against the oracle, on one to three map axes, to the second derivative and further."""

from __future__ import annotations

import pytest
import torch

from natten_ext import compat
from tests.operators.cases import cotangents_of, derivatives, find, grad_output_of, inputs_of, oracle_derivatives
from tests.operators.natten_cases import UNFUSED, close, heads_first, scores_of, unfused, windows_of

SMALL = [case for case in UNFUSED if case.small and case.shape[0]]


@pytest.mark.cases(UNFUSED)
def test_attention_to_the_second_derivative(case):
    inputs = inputs_of(case)
    arguments = inputs, grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    close(derivatives(lambda leaves: unfused(case, leaves), *arguments), oracle_derivatives(case, *arguments))


@pytest.mark.cases(UNFUSED)
def test_scores_are_in_row_major_order(case):
    """The n-th score that there is belongs to the n-th key that the oracle lists; in the place of others is -inf."""
    inputs = inputs_of(case)
    scores = scores_of(case, inputs).flatten(2, -2)
    query, key = (heads_first(inputs[name]).flatten(2, -2) for name in ("query", "key"))
    for place, entries in enumerate(case.neighbors[0]):
        keys = [key for key, _ in entries]
        expected = case.effective_scale * (query[:, :, place, None] * key[:, :, keys]).sum(-1)
        if case.bias:
            centre = [extent // 2 for extent in inputs["bias"].shape[1:]]
            offsets = torch.tensor([offset for _, offset in entries]) + torch.tensor(centre)
            expected = expected + inputs["bias"][(slice(None), *offsets.unbind(-1))]
        row = scores[:, :, place]
        torch.testing.assert_close(row[row > -torch.inf].view_as(expected), expected)
        assert (row == -torch.inf).sum() == row.numel() - expected.numel()


def test_missing_keys_come_last():
    """As in NATTEN: the second query of a causal axis has its two keys first."""
    line = torch.ones(1, 1, 4, 1)
    scores = compat.na1d_qk(line, line, 3, is_causal=True)
    assert torch.equal(scores[0, 0] > -torch.inf, torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool())
    weights = torch.full((1, 1, 4, 3), 7.0)
    assert compat.na1d_av(weights, line, 3, is_causal=True).flatten().tolist() == [7, 14, 21, 21]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_additional_keys_and_values(case):
    """Their scores come last; together they are attention over both."""
    inputs = inputs_of(case)
    query, key, value = (heads_first(inputs[name]) for name in ("query", "key", "value"))
    qk, av = (getattr(compat, f"na{case.axes}d_{name}") for name in ("qk", "av"))
    keys, values = torch.randn(2, *query.shape[:2], 3, query.shape[-1]).double()
    table = inputs.get("bias")
    scores = qk(query, key, **windows_of(case), additional_keys=keys, rpb=table)
    assert torch.equal(scores[..., :-3], qk(query, key, **windows_of(case), rpb=table))
    torch.testing.assert_close(scores[..., -3:], (query.flatten(2, -2) @ keys.mT).view(*query.shape[:-1], 3))
    weights = scores.softmax(-1)
    expected = av(weights[..., :-3], value, **windows_of(case))
    expected = expected + (weights[..., -3:].flatten(2, -2) @ values).view_as(value)
    torch.testing.assert_close(av(weights, value, **windows_of(case), additional_values=values), expected)


@pytest.mark.cases(SMALL)
def test_third_derivatives(case):
    """The three bilinear maps are each other's derivatives; a missing one would show here."""
    weight = torch.randn(case.shape[0], case.heads, *case.shape[1:-2], 1).double()
    query = heads_first(inputs_of(case)["query"]).detach()
    qk, av = (getattr(compat, f"na{case.axes}d_{name}") for name in ("qk", "av"))

    def function(q, v):
        return (av(qk(q, v, **windows_of(case)).tanh(), v, **windows_of(case)) * weight).sum()

    def once(q, v):
        first = torch.autograd.grad(function(q, v), (q, v), create_graph=True)
        return sum((g.square()).sum() for g in first)

    leaves = [query.clone().requires_grad_(), (query * 0.7).requires_grad_()]
    assert torch.autograd.gradgradcheck(once, leaves, fast_mode=True)


CAUSAL = {"is_causal": (False, True)}
BILINEAR = {  # and the channels of their two arguments
    "scores": (lambda a, b: compat.na2d_qk(a, b, (3, 2), (1, 2)), (5, 5)),
    "weighted sums": (lambda a, b: compat.na2d_av(a, b, (3, 2), (1, 2)), (6, 5)),
    "causal scores": (lambda a, b: compat.na2d_qk(a, b, (3, 2), (1, 2), **CAUSAL).sigmoid(), (5, 5)),
    "causal weighted sums": (lambda a, b: compat.na2d_av(a, b, (3, 2), (1, 2), **CAUSAL), (6, 5)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("name", BILINEAR)
def test_function_transforms(name, argument):
    """One argument is batched at a time, which sums that are formed in place must allow for."""
    function, channels = BILINEAR[name]
    arguments = [torch.randn(1, 2, 3, 4, count).double() for count in channels]

    def of_one(x: torch.Tensor) -> torch.Tensor:
        return function(*arguments[:argument], x, *arguments[argument + 1 :])

    stack = torch.randn(3, *arguments[argument].shape).double()
    assert torch.equal(torch.func.vmap(of_one)(stack), torch.stack([of_one(x) for x in stack]))
    expected = torch.autograd.functional.jacobian(of_one, stack[0])
    assert expected.count_nonzero()
    torch.testing.assert_close(torch.func.jacrev(of_one)(stack[0]), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(of_one, stack[0], vectorize=True), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_in_float32(dtype):
    case = find("na-7x9-k3", bias=True)
    inputs = {name: x.to(dtype) for name, x in inputs_of(case).items()}
    query, key = (heads_first(inputs[name]) for name in ("query", "key"))
    scores = compat.na2d_qk(query, key, case.kernel, case.dilation)
    exact = compat.na2d_qk(query.double(), key.double(), case.kernel, case.dilation)
    assert scores.dtype == dtype
    torch.testing.assert_close(scores, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    values = compat.na2d_av(scores, key, case.kernel, case.dilation)
    exact = compat.na2d_av(scores.double(), key.double(), case.kernel, case.dilation)
    torch.testing.assert_close(values, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_table_is_added_in_float32(table_dtype):
    """In bfloat16 a sum of ones ends at 256."""
    z = torch.zeros(2, 1, 64, 64, 4, dtype=torch.bfloat16)
    table = torch.zeros(1, 5, 5, dtype=table_dtype, requires_grad=True)
    compat.na2d_qk(z, z, 3, rpb=table).sum().backward()
    assert table.grad.dtype == table_dtype
    # The neighbor right of the query is the last of its window, except for queries of the last column.
    assert table.grad[0, 2, 2] == 2 * 64 * 64
    assert table.grad[0, 2, 3] == 2 * 64 * 63


def test_autocast_halves_the_maps():
    query = torch.randn(1, 2, 5, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = compat.na2d_qk(query, query, 3)
        assert scores.dtype == torch.bfloat16
        assert compat.na2d_av(scores.float().softmax(-1), query, 3).dtype == torch.bfloat16


def test_unfused_memory_is_that_of_its_arguments():
    """Gathering the keys of all queries at once would take 49 maps."""
    maps = torch.randn(1, 2, 32, 32, 16)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compat.na2d_qk(maps, maps, 7)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 49 / 16 * maps.numel() * 4  # the scores


@pytest.mark.slow
def test_compiled_without_a_break():
    maps = torch.randn(1, 2, 5, 6, 4)

    def attention(x: torch.Tensor) -> torch.Tensor:
        weights = compat.na2d_qk(x, x, 3, is_causal=(False, True)).softmax(-1)
        return compat.na2d_av(weights, x, 3, is_causal=(False, True))

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps), attention(maps))
