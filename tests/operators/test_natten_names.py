"""NATTEN's fused functions under its names, of both generations: against the oracle; and what is refused and how."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import natten_ext
from natten_ext import compat
from natten_ext.compat import arguments, natten_014, natten_021
from tests.operators.cases import cotangents_of, derivatives, grad_output_of, inputs_of, oracle_derivatives
from tests.operators.natten_cases import NATTEN_CASES, close


@pytest.mark.cases(NATTEN_CASES)
@pytest.mark.parametrize("order", [2])
def test_fused_functions(any_target, case, order):
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case, torch.float64, any_target.device)
    arguments = inputs, grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    expected = oracle_derivatives(case, *arguments, order=order)

    def current(leaves):
        q, k, v = (leaves[name] for name in ("query", "key", "value"))
        windows = case.kernel, case.stride, case.dilation, case.causal
        function = getattr(natten_ext, f"na{case.axes}d")
        return function(q, k, v, *windows, case.scale, backend=any_target.backend, rpb=leaves.get("bias"))

    def old(leaves):
        q, k, v = (leaves[name] for name in ("query", "key", "value"))
        function = getattr(compat, f"na{case.axes}d")
        rest = case.dilation, case.causal, leaves.get("bias"), case.scale
        with natten_ext.use_backend(any_target.backend):
            return function(q, k, v, case.kernel, *rest, stride=case.stride)

    def generic(leaves):
        q, k, v = (leaves[name] for name in ("query", "key", "value"))
        windows = case.kernel, case.stride, case.dilation, case.causal
        options = {"backend": any_target.backend, "rpb": leaves.get("bias")}
        return compat.neighborhood_attention_generic(q, k, v, *windows, case.scale, **options)

    for function in (current, old, generic):
        close({name: result.cpu() for name, result in derivatives(function, *arguments, order=order).items()}, expected)


def test_log_sum_exp():
    query, key, value = torch.randn(3, 1, 4, 5, 2, 8)
    expected = natten_ext.neighborhood_attention(query, key, value, 3, return_lse=True)
    for results in (
        natten_ext.na2d(query, key, value, 3, return_lse=True),
        compat.na2d(query, key, value, 3, return_lse=True),
    ):
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_merging(causal):
    """Attention over all keys is what merging makes of the attentions over the keys in two parts."""
    query, key, value = torch.randn(3, 2, 9, 2, 8).double()
    scores = torch.einsum("bqhc,bkhc->bhqk", query, key) * 8**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), value), scores.logsumexp(-1).movedim(1, -1)
    torch.testing.assert_close(compat.attention(query, key, value, causal, return_lse=True), expected)
    if not causal:
        torch.testing.assert_close(compat.attention(query, key, value), expected[0])
        parts = [
            compat.attention(query, key[:, part], value[:, part], return_lse=True) for part in (slice(4), slice(4, 9))
        ]
        outputs, lses = zip(*parts, strict=True)
        torch.testing.assert_close(compat.merge_attentions(outputs, lses, torch_compile=False), expected)


@pytest.mark.parametrize("name", ["na1d", "na2d", "na3d", "neighborhood_attention_generic"])
def test_signature_is_that_of_natten_0_21(name):
    names = list(inspect.signature(getattr(natten_021, name)).parameters)
    assert names == [
        "query", "key", "value", "kernel_size", "stride", "dilation", "is_causal", "scale",
        "additional_keys", "additional_values", "attention_kwargs", "backend", "q_tile_shape", "kv_tile_shape",
        "backward_q_tile_shape", "backward_kv_tile_shape", "backward_kv_splits", "backward_use_pt_reduction",
        "run_persistent_kernel", "kernel_schedule", "torch_compile", "return_lse", "rpb",
    ]  # fmt: skip


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_signatures_are_those_of_natten_0_17(axes):
    parameters = {
        name: list(inspect.signature(getattr(compat, f"na{axes}d{name}")).parameters) for name in ("", "_qk", "_av")
    }
    shared = ["kernel_size", "dilation"]
    assert parameters["_qk"] == ["query", "key", *shared, "additional_keys", "is_causal", "rpb"]
    assert parameters["_av"] == ["attn", "value", *shared, "additional_values", "is_causal"]
    more = ["additional_keys", "additional_values", "xformers_kwargs"]
    assert parameters[""][:11] == ["query", "key", "value", *shared, "is_causal", "rpb", "scale", *more]
    for name in parameters:
        function = getattr(compat, f"na{axes}d{name}")
        assert function.__name__ == f"na{axes}d{name}" and "{" not in function.__doc__


M = torch.zeros(2, 6, 8, 4, 8)
H = torch.zeros(2, 4, 6, 8, 8)
A = torch.zeros(2, 4, 6, 8, 9)
E = torch.zeros(2, 4, 5, 8)
S = torch.zeros(2, 7, 4, 8)


def nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(tensor), layout=torch.jagged)


TUNING = [
    {"attention_kwargs": {"backend": "cutlass-fmha"}},
    {"backend": "hopper-fna"},
    {"q_tile_shape": (8, 8)},
    {"kv_tile_shape": (8, 8)},
    {"backward_q_tile_shape": (8, 8)},
    {"backward_kv_tile_shape": (8, 8)},
    {"backward_kv_splits": (1, 1)},
    {"backward_use_pt_reduction": True},
    {"run_persistent_kernel": False},
    {"kernel_schedule": "coop"},
    {"torch_compile": True},
]


@pytest.mark.parametrize("options", TUNING, ids=lambda options: next(iter(options)))
def test_tuning_has_no_effect_and_is_said_once(options, monkeypatch):
    monkeypatch.setattr(arguments, "_warned", False)
    maps = torch.randn(1, 5, 6, 2, 4)
    expected = natten_ext.na2d(maps, maps, maps, 3)
    with pytest.warns(RuntimeWarning, match=f"ignores it: {next(iter(options))} ") as caught:
        assert torch.equal(natten_ext.na2d(maps, maps, maps, 3, **options), expected)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        natten_ext.na2d(maps, maps, maps, 3, **options)


@pytest.mark.parametrize(
    ("call", "exception", "pieces"),
    [
        (lambda: natten_ext.na1d(M, M, M, 3), ValueError, ["query", "4 dimensions", "(2, 6, 8, 4, 8)"]),
        (lambda: compat.na3d(M, M, M, 3), ValueError, ["query", "6 dimensions", "(2, 6, 8, 4, 8)"]),
        (lambda: natten_ext.na2d(M, M, M, 3, backend="hopper"), ValueError, ["backend", "hopper"]),
        (lambda: natten_ext.na2d(M, M, M, 3, 4), ValueError, ["stride", "4 > 3"]),
        (lambda: natten_ext.na2d(M, M, M, 3, is_causal=(True,)), TypeError, ["is_causal", "(True,)"]),
        (lambda: compat.neighborhood_attention_generic([M], M, M, 3), TypeError, ["query", "list"]),
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
        (lambda: compat.na2d_qk(H, H, 3, is_causal=1), TypeError, ["is_causal", "1"]),
        (lambda: compat.na2d_qk(H, H, 3, additional_keys=H), ValueError, ["additional_keys", "(2, 4, 6, 8, 8)"]),
        (lambda: compat.na2d_qk(H, H, 3, additional_keys=E.half()), TypeError, ["additional_keys", "float16"]),
        (lambda: compat.na2d_av(A, H, 3, additional_values=E), ValueError, ["attn", "9", "5", "14"]),
        (lambda: compat.na2d_av(A, H, 3, additional_values=[E]), TypeError, ["additional_values", "list"]),
        (lambda: compat.attention(S, S, S, max_seqlen_Q=3), NotImplementedError, ["max_seqlen_Q"]),
        (lambda: compat.attention(S, S[:, 1:], S[:, 1:], True), ValueError, ["is_causal", "(2, 7, 4, 8)"]),
        (lambda: compat.natten2dqkrpb(H, H, None, 3), TypeError, ["kernel_size", "dilation", "rpb"]),
        (lambda: compat.natten2dav(A[..., :8], H, 1), ValueError, ["attn", "square"]),
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


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_names_before_0_17(axes, table):
    """With one size of height and width, in three dimensions with another of the depth."""
    extents, kernel, dilation = [(9,), (7, 9), (5, 7, 9)][axes - 1], (3,), (2,)
    if axes == 3:
        kernel, dilation = (2, 3), (1, 2)
    query, key = torch.randn(2, 1, 2, *extents, 4).unbind(0)
    on_axes = [(size[0], size[-1], size[-1])[3 - axes :] for size in (kernel, dilation)]
    rpb = torch.randn(2, *(2 * k - 1 for k in on_axes[0])) if table else None
    names = {end: getattr(natten_014, f"natten{axes}d{end}") for end in ("qk", "qkrpb", "av")}
    expected = getattr(compat, f"na{axes}d_qk")(query, key, *on_axes, rpb=rpb)
    scores = names["qkrpb"](query, key, rpb, *kernel, *dilation)
    assert torch.equal(scores, expected)
    more = torch.randn(1, 2, 3, 4)
    scores_of_more = getattr(compat, f"na{axes}d_qk")(query, key, *on_axes, additional_keys=more, rpb=rpb)
    with_bias = getattr(compat, f"na{axes}d_qk_with_bias")
    assert torch.equal(with_bias(query, key, rpb, *kernel, *dilation), expected)
    assert torch.equal(with_bias(query, key, rpb, *kernel, *dilation, additional_keys=more), scores_of_more)
    function = getattr(compat, f"NATTEN{axes}DQKRPBFunction")
    assert torch.equal(function.apply(query, key, rpb, *kernel, *dilation), expected)
    if not table:
        assert torch.equal(names["qk"](query, key, *kernel, *dilation), expected)
    total = getattr(compat, f"na{axes}d_av")(scores, key, *on_axes)
    assert torch.equal(names["av"](scores, key, *kernel, *dilation), total)
    assert torch.equal(getattr(compat, f"NATTEN{axes}DAVFunction").apply(scores, key, *kernel, *dilation), total)
    if axes < 3:  # before 0.14.5 without the kernel
        assert torch.equal(names["av"](scores, key, *dilation), total)
        assert torch.equal(names["av"](scores, key, dilation=dilation[0]), total)
        if table:
            assert torch.equal(names["qkrpb"](query, key, rpb, *dilation), expected)
            assert torch.equal(names["qkrpb"](query, key, rpb, dilation=dilation[0]), expected)


def test_values_of_many_channels():
    """More than fused backends have kernels for: each channel is that of the value alone."""
    query, key = torch.randn(2, 1, 5, 6, 1, 8, dtype=torch.float64)
    value = torch.randn(1, 5, 6, 1, 300, dtype=torch.float64)
    output = compat.na2d(query, key, value, 3)
    parts = [compat.na2d(query, key, part, 3) for part in value.split(100, -1)]
    torch.testing.assert_close(output, torch.cat(parts, -1))
