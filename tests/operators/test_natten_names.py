"""NATTEN's functions under its names: against the oracle, to the second derivative."""

from __future__ import annotations

import inspect

import pytest
import torch

import natten_ext
from natten_ext import compat
from tests.operators.cases import (
    CASES,
    Case,
    cotangents_of,
    derivatives,
    find,
    grad_output_of,
    inputs_of,
    oracle_derivatives,
)

# NATTEN has one kernel and one dilation for all heads.
NATTEN_CASES = [
    case
    for case in CASES
    if case.kind == "neighborhood" and case.axes == 2 and not (case.general or case.groups or case.tied)
    if case.score == "dot"
]
SMALL = [case for case in NATTEN_CASES if case.small and case.shape[0]]


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(3, 1)


def unfused(case: Case, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The case as code written for NATTEN 0.17 computes it."""
    query, key, value = (heads_first(inputs[name]) for name in ("query", "key", "value"))
    scores = compat.na2d_qk(query * case.effective_scale, key, case.kernel, case.dilation, rpb=inputs.get("bias"))
    return compat.na2d_av(scores.softmax(-1), value, case.kernel, case.dilation).movedim(1, 3)


def close(results, expected):
    assert results.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            results[name], expected[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.cases(NATTEN_CASES)
def test_unfused_attention_to_the_second_derivative(case):
    inputs = inputs_of(case)
    arguments = inputs, grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    close(derivatives(lambda leaves: unfused(case, leaves), *arguments), oracle_derivatives(case, *arguments))


@pytest.mark.cases(NATTEN_CASES)
def test_scores_are_in_row_major_order(case):
    """Column n of the scores belongs to the n-th key that the oracle lists."""
    inputs = inputs_of(case)
    query, key = (heads_first(inputs[name]) for name in ("query", "key"))
    scores = compat.na2d_qk(query, key, case.kernel, case.dilation, rpb=inputs.get("bias")).flatten(2, 3)
    sets = case.neighbors[0]
    keys = torch.tensor([[key for key, _ in entries] for entries in sets])
    expected = (query.flatten(2, 3).unsqueeze(3) * key.flatten(2, 3)[:, :, keys]).sum(-1)
    if case.bias:
        rows, columns = torch.tensor([[offset for _, offset in entries] for entries in sets]).unbind(-1)
        table = inputs["bias"]
        expected = expected + table[:, rows + table.shape[1] // 2, columns + table.shape[2] // 2]
    torch.testing.assert_close(scores, expected)


@pytest.mark.cases(SMALL)
def test_third_derivatives_of_the_unfused_functions(case):
    """The three bilinear maps are each other's derivatives; a missing one would show here."""
    weight = torch.randn(*case.shape[:1], case.heads, *case.shape[1:3], 1).double()
    query = heads_first(inputs_of(case)["query"]).detach()

    def function(q, v):
        scores = compat.na2d_qk(q, v, case.kernel, case.dilation)
        return (compat.na2d_av(scores.tanh(), v, case.kernel, case.dilation) * weight).sum()

    def once(q, v):
        first = torch.autograd.grad(function(q, v), (q, v), create_graph=True)
        return sum((g.square()).sum() for g in first)

    leaves = [query.clone().requires_grad_(), (query * 0.7).requires_grad_()]
    assert torch.autograd.gradgradcheck(once, leaves, fast_mode=True)


BILINEAR = {  # and the channels of their two arguments
    "scores": (lambda a, b: compat.na2d_qk(a, b, (3, 2), (1, 2)), (5, 5)),
    "weighted sums": (lambda a, b: compat.na2d_av(a, b, (3, 2), (1, 2)), (6, 5)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("name", BILINEAR)
def test_function_transforms_of_the_unfused_functions(name, argument):
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


@pytest.mark.cases(NATTEN_CASES)
@pytest.mark.parametrize("order", [2])
def test_fused_na2d_of_both_generations(any_target, case, order):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case, torch.float64, any_target.device)
    arguments = inputs, grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    expected = oracle_derivatives(case, *arguments, order=order)

    def current(leaves):
        q, k, v = (leaves[name] for name in ("query", "key", "value"))
        return natten_ext.na2d(
            q,
            k,
            v,
            case.kernel,
            1,
            case.dilation,
            False,
            case.scale,
            backend=any_target.backend,
            rpb=leaves.get("bias"),
        )

    def old(leaves):
        q, k, v = (leaves[name] for name in ("query", "key", "value"))
        with natten_ext.use_backend(any_target.backend):
            return compat.na2d(q, k, v, case.kernel, case.dilation, False, leaves.get("bias"), case.scale)

    for function in (current, old):
        close({name: result.cpu() for name, result in derivatives(function, *arguments, order=order).items()}, expected)


def test_log_sum_exp_of_na2d():
    query, key, value = torch.randn(3, 1, 4, 5, 2, 8)
    expected = natten_ext.neighborhood_attention(query, key, value, 3, return_lse=True)
    for one, other in zip(natten_ext.na2d(query, key, value, 3, return_lse=True), expected, strict=True):
        assert torch.equal(one, other)


def test_signature_is_that_of_natten_0_21():
    names = list(inspect.signature(natten_ext.na2d).parameters)
    assert names == [
        "query", "key", "value", "kernel_size", "stride", "dilation", "is_causal", "scale",
        "additional_keys", "additional_values", "attention_kwargs", "backend", "q_tile_shape", "kv_tile_shape",
        "backward_q_tile_shape", "backward_kv_tile_shape", "backward_kv_splits", "backward_use_pt_reduction",
        "run_persistent_kernel", "kernel_schedule", "torch_compile", "return_lse", "rpb",
    ]  # fmt: skip


M = torch.zeros(2, 6, 8, 4, 8)
H = torch.zeros(2, 4, 6, 8, 8)
A = torch.zeros(2, 4, 6, 8, 9)


def nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(tensor), layout=torch.jagged)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": (1, 2)},
        {"is_causal": True},
        {"is_causal": (False, True)},
        {"additional_keys": torch.zeros(2, 3, 4, 8)},
        {"additional_values": torch.zeros(2, 3, 4, 8)},
        {"attention_kwargs": {"backend": "x"}},
        {"q_tile_shape": (8, 8)},
        {"kv_tile_shape": (8, 8)},
        {"backward_q_tile_shape": (8, 8)},
        {"backward_kv_tile_shape": (8, 8)},
        {"backward_kv_splits": (1, 1)},
        {"backward_use_pt_reduction": True},
        {"run_persistent_kernel": False},
        {"kernel_schedule": "coop"},
        {"torch_compile": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_na2d_lacks_is_named(options):
    with pytest.raises(NotImplementedError, match=f"^{next(iter(options))}: natten_ext does not support"):
        natten_ext.na2d(M, M, M, 3, **options)


@pytest.mark.parametrize(
    ("call", "exception", "pieces"),
    [
        (lambda: natten_ext.na2d(M, M[..., :2, :], M[..., :2, :], 3), NotImplementedError, ["key", "heads", "4"]),
        (lambda: natten_ext.na2d(M, M, M, 3, backend="hopper-fna"), ValueError, ["backend", "hopper-fna"]),
        (lambda: natten_ext.na2d(M, M, M, [3, 3, 3]), TypeError, ["kernel_size", "3"]),
        (lambda: natten_ext.na2d(M, M, M, [3, 3, 3, 3]), TypeError, ["kernel_size", "(3, 3, 3, 3)"]),
        (lambda: compat.na2d(M, M, M, 3, [1]), TypeError, ["dilation", "1"]),
        (lambda: natten_ext.na2d(M, M, M, 3, rpb=torch.zeros(4, 3, 3)), ValueError, ["rpb", "(4, 5, 5)", "(4, 3, 3)"]),
        (lambda: compat.na2d(M, M, M, 3, rpb=torch.zeros(5, 5, 4)), ValueError, ["rpb", "(4, 5, 5)", "(5, 5, 4)"]),
        (lambda: natten_ext.na2d(M, M, M, 3, rpb=True), TypeError, ["rpb", "bool"]),
        (lambda: compat.na2d(M, M, M, 3, rpb=torch.zeros(4, 5, 5).int()), TypeError, ["rpb", "int32"]),
        (lambda: natten_ext.na2d(M, M, M, 3, rpb=torch.zeros(4, 5, 5).to_sparse()), TypeError, ["rpb", "sparse"]),
        (lambda: natten_ext.na2d(M.to_sparse(), M, M, 3), TypeError, ["query", "torch.sparse_coo"]),
        (lambda: natten_ext.na2d(M, M, nested(M), 3), TypeError, ["value", "nested"]),
        (lambda: natten_ext.na2d(nested(M), nested(M), M, 3), TypeError, ["query", "nested"]),
        (lambda: natten_ext.na2d(M, [M], M, 3), TypeError, ["key", "list"]),
        (lambda: compat.na2d_qk(H, H, 3, rpb=torch.zeros(4, 5, 5).to_mkldnn()), TypeError, ["rpb", "mkldnn"]),
        (lambda: compat.na2d_qk(H, H, 3, rpb=torch.zeros(4, 5, 5, dtype=torch.int8)), TypeError, ["rpb", "int8"]),
        (lambda: compat.na2d_qk(H, H, 3, rpb=torch.zeros(4, 5, 5, device="meta")), ValueError, ["rpb", "meta"]),
        (lambda: compat.na2d_qk(H, H.to_sparse(), 3), TypeError, ["key", "torch.sparse_coo"]),
        (lambda: compat.na2d_av(A.to_mkldnn(), H, 3), TypeError, ["attn", "mkldnn"]),
        (lambda: compat.na2d_av(A, nested(H), 3), TypeError, ["value", "nested"]),
        (lambda: natten_ext.na2d(M, M, M, 3, stride=None), TypeError, ["stride", "None"]),
        (lambda: natten_ext.na2d(M, M, M, 3, 1, 4), ValueError, ["kernel_size", "3 * 4", "6"]),
        (lambda: compat.na2d(M, M, M, 3, is_causal=True), NotImplementedError, ["is_causal"]),
        (lambda: compat.na2d(M, M, M, 3, xformers_kwargs={"a": 1}), NotImplementedError, ["xformers_kwargs"]),
        (lambda: compat.na2d_qk(H, H, 3, is_causal=(True, False)), NotImplementedError, ["is_causal"]),
        (
            lambda: compat.na2d_qk(H, H, 3, additional_keys=H),
            NotImplementedError,
            ["additional_keys", "(2, 4, 6, 8, 8)"],
        ),
        (lambda: compat.na2d_av(A, H, 3, additional_values=H), NotImplementedError, ["additional_values"]),
        (lambda: compat.na2d_qk(H, H[..., :4], 3), ValueError, ["key", "(2, 4, 6, 8, 4)"]),
        (lambda: compat.na2d_qk(H, H.double(), 3), TypeError, ["key", "float64"]),
        (lambda: compat.na2d_qk(H[0], H, 3), ValueError, ["query", "(4, 6, 8, 8)"]),
        (lambda: compat.na2d_qk(H.int(), H, 3), TypeError, ["query", "int32"]),
        (lambda: compat.na2d_qk(H, H.to("meta"), 3), ValueError, ["key", "meta"]),
        (lambda: compat.na2d_qk(H, H, 7), ValueError, ["kernel_size", "7", "6"]),
        (lambda: compat.na2d_qk(H, H, 3, 0), ValueError, ["dilation", "0"]),
        (lambda: compat.na2d_qk(H, H, 3, rpb=torch.zeros(4, 3, 3)), ValueError, ["rpb", "(4, 5, 5)", "(4, 3, 3)"]),
        (lambda: compat.na2d_qk(H, H, 3, rpb=1.0), TypeError, ["rpb", "float"]),
        (lambda: compat.na2d_av(A, H, 5), ValueError, ["attn", "25", "9"]),
        (lambda: compat.na2d_av(A.tolist(), H, 3), TypeError, ["attn", "list"]),
    ],
)
def test_bad_input_is_named(call, exception, pieces):
    with pytest.raises(exception) as caught:
        call()
    for piece in pieces:
        assert piece in str(caught.value)


def test_a_list_of_two_is_a_pair_as_in_natten():
    q, k, v = torch.randn(3, 1, 7, 9, 2, 4).unbind(0)
    expected = natten_ext.neighborhood_attention(q, k, v, (3, 5), (2, 1))
    assert torch.equal(natten_ext.na2d(q, k, v, [3, 5], 1, [2, 1]), expected)
    assert torch.equal(compat.na2d(q, k, v, [3, 5], [2, 1]), expected)


def test_names_before_0_17():
    query, key = torch.randn(2, 1, 2, 7, 9, 4).unbind(0)
    rpb = torch.randn(2, 5, 5)
    scores = compat.natten2dqkrpb(query, key, rpb, 3, 2)
    assert torch.equal(scores, compat.na2d_qk(query, key, 3, 2, rpb=rpb))
    assert torch.equal(compat.natten2dav(scores, key, 3, 2), compat.na2d_av(scores, key, 3, 2))
    assert torch.equal(compat.natten2dqkrpb(query, key, None, 3, 2), compat.na2d_qk(query, key, 3, 2))


def test_unfused_memory_is_that_of_its_arguments():
    """Gathering the keys of all queries at once would take 49 maps."""
    maps = torch.randn(1, 2, 32, 32, 16)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compat.na2d_qk(maps, maps, 7)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 49 / 16 * maps.numel() * 4  # the scores
