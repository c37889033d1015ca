"""Bad input of every kind: the message names the argument and its value."""

from __future__ import annotations

import inspect
import math
import re

import numpy as np
import pytest
import torch

import natten_ext

ATTENTION, L2, GRID, NA = (
    natten_ext.attention,
    natten_ext.l2_attention,
    natten_ext.grid_attention,
    natten_ext.neighborhood_attention,
)


def sequence(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape or (2, 6, 2, 8), **options)


def image(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape or (2, 6, 8, 4, 8), **options)


def nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(tensor), layout=torch.jagged)


def three(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor, tensor, tensor


def more(keys: torch.Tensor, values: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    return dict(zip(MORE, (keys, keys if values is None else values), strict=True))


S, M, V = three(sequence()), three(image()), three(sequence(1, 3, 4, 5, 2, 8))
DOUBLE = {"dtype": torch.float64}
MORE, X = ("additional_keys", "additional_values"), sequence(2, 5, 4, 8)
MERGE, ROWS = natten_ext.merge_attention, torch.zeros(2, 6, 2)

# (what is wrong, function, positional arguments, options, exception, pieces of the message)
BAD = [
    # tensors
    ("query is a list", ATTENTION, ([1.0], *S[1:]), {}, TypeError, ["query", "list"]),
    ("key is None", ATTENTION, (S[0], None, S[2]), {}, TypeError, ["key", "NoneType"]),
    ("value is an array", GRID, (*M[:2], M[2].numpy(), 2), {}, TypeError, ["value", "ndarray"]),
    ("query of rank 3", ATTENTION, three(sequence(2, 6, 8)), {}, ValueError, ["query", "(2, 6, 8)"]),
    ("query of rank 5", ATTENTION, M, {}, ValueError, ["query", "(2, 6, 8, 4, 8)"]),
    ("key of rank 3", ATTENTION, (S[0], sequence(2, 6, 8), S[2]), {}, ValueError, ["key", "(2, 6, 8)"]),
    ("map of rank 3", GRID, (*three(sequence(2, 6, 8)), 2), {}, ValueError, ["query", "4 to 6", "*map", "(2, 6, 8)"]),
    ("map of rank 7", NA, (*three(sequence(1, 2, 3, 3, 3, 2, 8)), 3), {}, ValueError, ["4 to 6", "(1, 2, 3, 3, 3, 2"]),
    ("key of another rank", NA, (*M[:1], S[1], M[2], 3), {}, ValueError, ["key", "height, width", "(2, 6, 2, 8)"]),
    ("depth 0", NA, (*three(sequence(1, 0, 3, 3, 2, 8)), 1), {}, ValueError, ["depth", "(1, 0, 3, 3, 2, 8)"]),
    ("line of width 0", GRID, (*three(sequence(1, 0, 2, 8)), 1), {}, ValueError, ["width", "(1, 0, 2, 8)"]),
    ("integers", ATTENTION, three(sequence(dtype=torch.int64)), {}, TypeError, ["query", "int64"]),
    ("complex", ATTENTION, three(sequence(dtype=torch.complex64)), {}, TypeError, ["query", "complex64"]),
    ("bool", NA, (*three(image(dtype=torch.bool)), 3), {}, TypeError, ["query", "bool"]),
    ("key dtype", ATTENTION, (S[0], sequence(**DOUBLE), S[2]), {}, TypeError, ["key", "float32", "float64"]),
    ("value dtype", NA, (*M[:2], image(dtype=torch.bfloat16), 3), {}, TypeError, ["value", "bfloat16"]),
    ("key device", ATTENTION, (S[0], sequence(device="meta"), S[2]), {}, ValueError, ["key", "meta"]),
    ("value device", GRID, (*M[:2], image(device="meta"), 2), {}, ValueError, ["value", "meta"]),
    ("key batch", ATTENTION, (S[0], *three(sequence(3, 6, 2, 8))[:2]), {}, ValueError,
     ["key", "(3, 6, 2, 8)"]),
    ("key heads", L2, (S[0], *three(sequence(2, 6, 3, 8))[:2]), {}, ValueError, ["key", "query's 2", "(2, 6, 3, 8)"]),
    ("no key heads", NA, (M[0], *three(image(2, 6, 8, 0, 8))[:2], 3), {}, ValueError, ["key", "query's 4"]),
    ("key head_dim", ATTENTION, (S[0], *three(sequence(2, 6, 2, 4))[:2]), {}, ValueError, ["key", "(2, 6, 2, 4)"]),
    ("value tokens", ATTENTION, (*S[:2], sequence(2, 5, 2, 8)), {}, ValueError, ["value", "(2, 5, 2, 8)"]),
    ("value head_dim 0", ATTENTION, (*S[:2], sequence(2, 6, 2, 0)), {}, ValueError, ["value", "(2, 6, 2, 0)"]),
    ("value heads", ATTENTION, (*S[:2], sequence(2, 6, 1, 8)), {}, ValueError, ["value", "(2, 6, 1, 8)"]),
    ("key of another map", GRID, (M[0], image(2, 8, 6, 4, 8), M[2], 2), {}, ValueError, ["key", "(2, 8, 6, 4, 8)"]),
    ("value of another map", NA, (*M[:2], image(2, 8, 6, 4, 8), 3), {}, ValueError, ["value", "(2, 8, 6, 4, 8)"]),
    ("no keys", ATTENTION, (S[0], *three(sequence(2, 0, 2, 8))[:2]), {}, ValueError, ["key", "0"]),
    ("head_dim 0", ATTENTION, three(sequence(2, 6, 2, 0)), {}, ValueError, ["head_dim", "(2, 6, 2, 0)"]),
    ("heads 0", NA, (*three(image(2, 6, 8, 0, 8)), 3), {}, ValueError, ["heads", "(2, 6, 8, 0, 8)"]),
    ("height 0", GRID, (*three(image(2, 0, 8, 4, 8)), 2), {}, ValueError, ["height", "(2, 0, 8, 4, 8)"]),
    ("width 0", NA, (*three(image(2, 6, 0, 4, 8)), 1), {}, ValueError, ["width", "(2, 6, 0, 4, 8)"]),
    ("query sparse", ATTENTION, (S[0].to_sparse(), *S[1:]), {}, TypeError, ["query", "torch.sparse_coo"]),
    ("value mkldnn", GRID, (*M[:2], M[2].to_mkldnn(), 2), {}, TypeError, ["value", "torch._mkldnn"]),
    ("query nested", ATTENTION, three(nested(S[0])), {}, TypeError, ["query", "nested"]),
    ("value nested", NA, (*M[:2], nested(M[2]), 3), {}, TypeError, ["value", "nested"]),
    # window
    ("window wider than the map", GRID, (*M, (3, 9)), {}, ValueError, ["window_size", "width 8", "9"]),
    ("shift of a window", GRID, (*M, 3), {"shift": 3}, ValueError, ["shift", "window_size", "3 >= 3"]),
    ("shift on an axis", GRID, (*M, (3, 2)), {"shift": 2}, ValueError, ["shift", "2 >= 2"]),
    ("shift negative", GRID, (*M, 3), {"shift": -1}, ValueError, ["shift", "-1"]),
    ("shift float", GRID, (*M, 3), {"shift": 1.0}, TypeError, ["shift", "1.0"]),
    ("shift list", GRID, (*M, 3), {"shift": [1, 1]}, TypeError, ["shift", "[1, 1]"]),
    ("window larger than the map", GRID, (*M, 12), {}, ValueError, ["window_size", "12"]),
    ("window 0", GRID, (*M, 0), {}, ValueError, ["window_size", "0"]),
    ("window negative", GRID, (*M, (2, -2)), {}, ValueError, ["window_size", "-2"]),
    ("window float", GRID, (*M, 2.0), {}, TypeError, ["window_size", "2.0"]),
    ("window True", GRID, (*M, True), {}, TypeError, ["window_size", "True"]),
    ("window huge", GRID, (*M, 10**5000), {}, ValueError, ["window_size", "huge int"]),
    ("window list", GRID, (*M, [2, 2]), {}, TypeError, ["window_size", "[2, 2]"]),
    ("window triple", GRID, (*M, (2, 2, 2)), {}, TypeError, ["window_size", "(2, 2, 2)"]),
    ("window None", GRID, (*M, None), {}, TypeError, ["window_size", "None"]),
    # log-sum-exp
    ("return_lse None", ATTENTION, S, {"return_lse": None}, TypeError, ["return_lse", "None"]),
    ("return_lse 1", NA, (*M, 3), {"return_lse": 1}, TypeError, ["return_lse", "1"]),
    ("outputs a tensor", MERGE, (S[0], [ROWS]), {}, TypeError, ["outputs", "tensor("]),
    ("lses None", MERGE, ([S[0]], None), {}, TypeError, ["lses", "None"]),
    ("outputs hold None", MERGE, ([S[0], None], [ROWS] * 2), {}, TypeError, ["outputs[1]", "NoneType"]),
    ("lses hold a list", MERGE, ([S[0]], [[1.0]]), {}, TypeError, ["lses[0]", "list"]),
    ("no outputs", MERGE, ([], []), {}, ValueError, ["outputs", "0"]),
    ("fewer lses", MERGE, (S[:2], [ROWS]), {}, ValueError, ["2 outputs", "1 lses"]),
    ("outputs of two shapes", MERGE, ([S[0], sequence(2, 5, 2, 8)], [ROWS] * 2), {}, ValueError,
     ["outputs[1]", "(2, 6, 2, 8)", "(2, 5, 2, 8)"]),
    ("outputs of two dtypes", MERGE, ([S[0], sequence(**DOUBLE)], [ROWS] * 2), {}, ValueError, ["[1]", "float64"]),
    ("outputs on two devices", MERGE, ([S[0], sequence(device="meta")], [ROWS] * 2), {}, ValueError,
     ["outputs[1]", "meta"]),
    ("integer outputs", MERGE, ([sequence(dtype=torch.int64)], [ROWS]), {}, ValueError, ["outputs", "int64"]),
    ("lses with a channel", MERGE, ([S[0]], [S[0]]), {}, ValueError, ["lses", "(2, 6, 2)", "(2, 6, 2, 8)"]),
    ("lses of heads first", MERGE, ([S[0]], [ROWS.movedim(-1, 1)]), {}, ValueError, ["lses", "(2, 6, 2)", "(2, 2, 6)"]),
    ("lses of half precision", MERGE, ([S[0].half()], [ROWS.half()]), {}, ValueError, ["lses", "float32", "float16"]),
    ("lses of two dtypes", MERGE, (S[:2], [ROWS, ROWS.double()]), {}, ValueError, ["lses[1]", "float64"]),
    # kernel and dilation
    ("kernel larger than the map", NA, (*M, 7), {}, ValueError, ["kernel_size", "height", "7", "6"]),
    ("kernel * dilation", NA, (*M, 3, 3), {}, ValueError, ["kernel_size", "dilation", "3 * 3", "6"]),
    ("kernel * dilation on an axis", NA, (*M, 3, (2, 3)), {}, ValueError, ["kernel_size", "width", "3 * 3", "8"]),
    ("kernel * dilation of one group", NA, (*M, 3, [1, 3]), {}, ValueError, ["kernel_size", "3 * 3", "6"]),
    ("kernel 0", NA, (*M, 0), {}, ValueError, ["kernel_size", "0"]),
    ("kernel negative", NA, (*M, (3, -1)), {}, ValueError, ["kernel_size", "-1"]),
    ("kernel huge", NA, (*M, 2**70), {}, ValueError, ["kernel_size", str(2**70), "height 6"]),
    ("dilation huge", NA, (*M, 1, 10**5000), {}, ValueError, ["dilation", "huge int"]),
    ("kernel 0 in a list", NA, (*M, [3, 0]), {}, ValueError, ["kernel_size", "0"]),
    ("kernel float", NA, (*M, 3.0), {}, TypeError, ["kernel_size", "3.0"]),
    ("kernel string", NA, (*M, "3"), {}, TypeError, ["kernel_size", "'3'"]),
    ("dilation 0", NA, (*M, 3, 0), {}, ValueError, ["dilation", "0"]),
    ("dilation negative", NA, (*M, 3, (1, -2)), {}, ValueError, ["dilation", "-2"]),
    ("dilation float", NA, (*M, 3, 1.5), {}, TypeError, ["dilation", "1.5"]),
    ("dilation None", NA, (*M, 3, None), {}, TypeError, ["dilation", "None"]),
    ("3 groups of 4 heads", NA, (*M, [3, 3, 3]), {}, ValueError, ["kernel_size", "4 heads", "3"]),
    ("3 dilations for 4 heads", NA, (*M, 3, [1, 1, 2]), {}, ValueError, ["dilation", "4 heads", "3"]),
    ("8 groups of 4 heads", NA, (*M, [3] * 8), {}, ValueError, ["kernel_size", "4 heads", "8"]),
    ("pair as a list", NA, (*M, [3, 5, 3]), {}, ValueError, ["kernel_size", "4 heads", "tuple"]),
    ("no groups", NA, (*M, []), {}, ValueError, ["kernel_size", "0"]),
    ("list in a list", NA, (*M, [[3, 3], [3, 3]]), {}, TypeError, ["kernel_size", "[3, 3]"]),
    ("pair on a line", NA, (*S, (3, 3)), {}, TypeError, ["kernel_size", "(width,)", "(3, 3)"]),
    ("pair on a volume", NA, (*V, (2, 2)), {}, TypeError, ["kernel_size", "(depth, height, width)", "(2, 2)"]),
    ("window deeper than the map", GRID, (*V, 4), {}, ValueError, ["window_size", "depth 3", "4"]),
    ("kernel deeper than the map", NA, (*V, (4, 2, 2)), {}, ValueError, ["kernel_size", "depth", "4", "3"]),
    ("stride 0", NA, (*M, 3), {"stride": 0}, ValueError, ["stride", "0"]),
    ("stride beyond the kernel", NA, (*M, 3), {"stride": 4}, ValueError, ["stride", "4 > 3"]),
    ("stride of one group", NA, (*M, [3, 5]), {"stride": 4}, ValueError, ["stride", "4 > 3"]),
    ("stride float", NA, (*M, 3), {"stride": 1.5}, TypeError, ["stride", "1.5"]),
    ("stride True", NA, (*M, 3), {"stride": True}, TypeError, ["stride", "True"]),
    ("3 strides for 4 heads", NA, (*M, 3), {"stride": [1, 2, 3]}, ValueError, ["stride", "4 heads", "3"]),
    ("causal None", NA, (*M, 3), {"is_causal": None}, TypeError, ["is_causal", "None"]),
    ("causal 1", NA, (*M, 3), {"is_causal": 1}, TypeError, ["is_causal", "1"]),
    ("causal triple", NA, (*M, 3), {"is_causal": (True,) * 3}, TypeError, ["is_causal", "(height, width)"]),
    ("causal list", NA, (*M, 3), {"is_causal": [True, False]}, TypeError, ["is_causal", "[True, False]"]),
    # additional keys
    ("additional keys alone", NA, (*M, 3), {"additional_keys": X}, ValueError, [*MORE, "None"]),
    ("additional values alone", NA, (*M, 3), {"additional_values": X}, ValueError, [*MORE, "None"]),
    ("additional map", NA, (*M, 3), more(image()), ValueError, ["additional_keys", "(2, 6, 8, 4, 8)"]),
    ("additional dtype", NA, (*M, 3), more(X.double()), TypeError, ["additional_keys", "float32", "float64"]),
    ("additional device", NA, (*M, 3), more(X.to("meta")), ValueError, ["additional_keys", "meta"]),
    ("additional batch", NA, (*M, 3), more(sequence(3, 5, 4, 8)), ValueError, ["additional_keys", "(3, 5, 4, 8)"]),
    ("additional heads", NA, (*M, 3), more(sequence(2, 5, 3, 8)), ValueError, ["additional_keys", "(2, 5, 3, 8)"]),
    ("no additional keys", NA, (*M, 3), more(sequence(2, 0, 4, 8)), ValueError, ["additional_keys", "(2, 0, 4, 8)"]),
    ("additional values' tokens", NA, (*M, 3), more(X, sequence(2, 4, 4, 8)), ValueError, [MORE[1], "(2, 4, 4, 8)"]),
    # table
    ("table of another kernel", NA, (*M, 3), {"bias": torch.zeros(4, 7, 7)},
     ValueError, ["bias", "(4, 5, 5)", "(4, 7, 7)"]),
    ("table of another window", GRID, (*M, (3, 4)), {"bias": torch.zeros(4, 7, 5)},
     ValueError, ["bias", "(4, 5, 7)", "(4, 7, 5)"]),
    ("table of other heads", GRID, (*M, 2), {"bias": torch.zeros(1, 3, 3)},
     ValueError, ["bias", "(4, 3, 3)", "(1, 3, 3)"]),
    ("table of rank 2", GRID, (*M, 2), {"bias": torch.zeros(3, 3)}, ValueError, ["bias", "(3, 3)"]),
    ("table of the smaller kernel", NA, (*M, [5, 3]), {"bias": torch.zeros(4, 5, 5)},
     ValueError, ["bias", "(4, 9, 9)"]),
    ("table dtype", NA, (*M, 3), {"bias": torch.zeros(4, 5, 5, **DOUBLE)}, TypeError, ["bias", "float64"]),
    ("table of integers", NA, (*M, 3), {"bias": torch.zeros(4, 5, 5, dtype=torch.int32)}, TypeError, ["bias", "int32"]),
    ("table device", GRID, (*M, 2), {"bias": torch.zeros(4, 3, 3, device="meta")}, ValueError, ["bias", "meta"]),
    ("table not a tensor", GRID, (*M, 2), {"bias": True}, TypeError, ["bias", "bool"]),
    ("table sparse", NA, (*M, 3), {"bias": torch.zeros(4, 5, 5).to_sparse()}, TypeError, ["bias", "sparse"]),
    ("table mkldnn", GRID, (*M, 2), {"bias": torch.zeros(4, 3, 3).to_mkldnn()}, TypeError, ["bias", "mkldnn"]),
    # score, scale, backend
    ("score unknown", ATTENTION, S, {"score": "cosine"}, ValueError, ["score", "cosine"]),
    ("score array", ATTENTION, S, {"score": np.ones(2)}, ValueError, ["score", "array"]),
    ("score None", NA, (*M, 3), {"score": None}, ValueError, ["score", "None"]),
    ("scale 0", ATTENTION, S, {"scale": 0.0}, ValueError, ["scale", "0.0"]),
    ("scale negative", L2, S, {"scale": -0.5}, ValueError, ["scale", "-0.5"]),
    ("scale infinite", GRID, (*M, 2), {"scale": math.inf}, ValueError, ["scale", "inf"]),
    ("scale not a number", NA, (*M, 3), {"scale": math.nan}, ValueError, ["scale", "nan"]),
    ("scale a huge int", ATTENTION, S, {"scale": 10**400}, ValueError, ["scale", "8.51e+37", "float32", "10000"]),
    ("scale longer than Python prints", L2, S, {"scale": 10**5000}, ValueError, ["scale", "huge int"]),
    ("scale that float32 scores overflow", NA, (*M, 3), {"scale": 1e39}, ValueError, ["scale", "8.51e+37", "1e+39"]),
    ("scale beyond bfloat16's scores", L2, three(sequence(dtype=torch.bfloat16)), {"scale": 1e39}, ValueError,
     ["scale", "8.51e+37", "bfloat16"]),
    ("scale beyond float64", L2, three(sequence(**DOUBLE)), {"scale": 1e308}, ValueError, ["scale", "4.49e+307"]),
    ("scale string", ATTENTION, S, {"scale": "1"}, TypeError, ["scale", "'1'"]),
    ("scale bool", ATTENTION, S, {"scale": True}, TypeError, ["scale", "True"]),
    ("scale tensor", ATTENTION, S, {"scale": torch.tensor(0.5)}, TypeError, ["scale", "Tensor"]),
    ("backend unknown", ATTENTION, S, {"backend": "flash"}, ValueError, ["backend", "flash"]),
    ("backend array", ATTENTION, S, {"backend": np.ones(2)}, ValueError, ["backend", "array"]),
    ("backend not a name", ATTENTION, S, {"backend": 3}, (TypeError, ValueError), ["backend", "3"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "arguments", "options", "exception", "pieces"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
@pytest.mark.samples(native=1000)
def test_bad_input_is_named(function, arguments, options, exception, pieces):
    with pytest.raises(exception) as caught:
        function(*arguments, **options)
    for piece in pieces:
        assert piece in str(caught.value)


@pytest.mark.parametrize("name", ["score", "scale", "backend", "bias"])
def test_options_are_by_keyword_only(name):
    value = {"score": "dot", "scale": 1.0, "backend": "reference", "bias": None}[name]
    with pytest.raises(TypeError):
        GRID(*M, 2, value)
    assert GRID(*M, 2, **{name: value}).shape == M[0].shape


def test_a_backend_that_cannot_says_why(target):
    """Whatever the limits of a backend are, asking for it beyond them raises its reason."""
    beyond = [
        torch.zeros(1, 4, 1, 1000, device=target.device),
        torch.zeros(1, 4, 1, 8, device=target.device, dtype=torch.float8_e4m3fn),
    ]
    for tensor in beyond:
        statuses = natten_ext.list_backends(target.device, tensor.dtype, tensor.shape[-1])
        status = next(s for s in statuses if s.name == target.backend)
        if not status.available:
            with pytest.raises(RuntimeError, match=re.escape(status.reason)):
                ATTENTION(*three(tensor), backend=target.backend)


def test_head_dims_beyond_the_fused_limit_fall_back_on_the_cpu():
    """On a CPU the unfused reference is no trap: `auto` takes it without a word."""
    query = torch.randn(1, 4, 1, 300)
    expected = torch.nn.functional.scaled_dot_product_attention(*three(query.transpose(1, 2))).transpose(1, 2)
    torch.testing.assert_close(ATTENTION(*three(query)), expected)


@pytest.mark.parametrize(
    ("make", "pieces"),
    [
        (lambda: natten_ext.Attention(10, 3), ["num_heads", "10", "3"]),
        (lambda: natten_ext.Attention(10, 0), ["num_heads", "0"]),
        (lambda: natten_ext.Attention(0, 1), ["embed_dim", "0"]),
        (lambda: natten_ext.Attention(8, "2"), ["num_heads", "'2'"]),
        (lambda: natten_ext.NeighborhoodAttention(8, 2.0, 3), ["num_heads", "2.0"]),
        (lambda: natten_ext.L2Attention(8.0, 2), ["embed_dim", "8.0"]),
        (lambda: natten_ext.Attention(8, 2, score="cos"), ["score", "cos"]),
        (lambda: natten_ext.L2Attention(8, 2, scale=-1.0), ["scale", "-1.0"]),
        (lambda: natten_ext.Attention(8, 2, scale="1"), ["scale", "'1'"]),
        (lambda: natten_ext.GridAttention(8, 2, 2, backend="flash"), ["backend", "flash"]),
        (lambda: natten_ext.GridAttention(8, 2, 2, bias=torch.zeros(2, 3, 3)), ["bias", "True or False"]),
        (lambda: natten_ext.Attention(8, 2, qkv_bias="no"), ["qkv_bias", "'no'"]),
        (lambda: natten_ext.L2Attention(8, 2, proj_bias=None), ["proj_bias", "None"]),
        (lambda: natten_ext.Attention(8, 2, proj_drop="0.1"), ["proj_drop", "'0.1'"]),
        (lambda: natten_ext.Attention(8, 2, proj_drop=1.5), ["proj_drop", "1.5"]),
        (lambda: natten_ext.Attention(8, 2, proj_drop=math.nan), ["proj_drop", "nan"]),
        (lambda: natten_ext.GridAttention(8, 2, 0), ["window_size", "0"]),
        (lambda: natten_ext.NeighborhoodAttention(8, 2, 0), ["kernel_size", "0"]),
        (lambda: natten_ext.NeighborhoodAttention(8, 2, 3, 0), ["dilation", "0"]),
        (lambda: natten_ext.NeighborhoodAttention(8, 2, [3, 3, 3]), ["kernel_size", "2 heads", "3"]),
        (lambda: natten_ext.NeighborhoodAttention(8, 2, 3, [1, 1, 1]), ["dilation", "2 heads", "3"]),
        (lambda: natten_ext.Attention(8, 2)(torch.zeros(2, 5, 6)), ["8", "(2, 5, 6)"]),
        (lambda: natten_ext.Attention(8, 2)([1.0]), ["input", "list"]),
        (lambda: natten_ext.Attention(8, 2)(torch.zeros(2, 5, 8).to_sparse()), ["input", "sparse"]),
        (lambda: natten_ext.GridAttention(8, 2, 2)(torch.zeros(2, 16, 8)), ["(2, 16, 8)"]),
        (lambda: natten_ext.GridAttention(8, 2, 5)(torch.zeros(2, 4, 6, 8)), ["window_size", "height 4", "5"]),
        (lambda: natten_ext.GridAttention(8, 2, 2, shift=2), ["shift", "2 >= 2"]),
        (lambda: natten_ext.NeighborhoodAttention(8, 2, 5)(torch.zeros(2, 4, 6, 8)), ["kernel_size", "5"]),
        (lambda: natten_ext.Attention(8, 2).attention_weights([1.0], [0]), ["input", "list"]),
        (lambda: natten_ext.Attention(8, 2).attention_weights(torch.zeros(2, 5, 6), [0]), ["input", "8", "(2, 5, 6)"]),
        (lambda: natten_ext.GridAttention(8, 2, 2).attention_weights(torch.zeros(4, 8), [0]), ["input", "(4, 8)"]),
        (lambda: natten_ext.L2Attention(8, 2, score="dot"), ["score"]),
        (lambda: natten_ext.Attention(8, 2, bias=True), ["bias"]),
        (lambda: natten_ext.GridAttention(8, 2, 2, map_axes=4), ["map_axes", "4"]),
        (lambda: natten_ext.NeighborhoodAttention(8, 2, 3, map_axes=0), ["map_axes", "0"]),
        (lambda: natten_ext.NeighborhoodAttention(8, 2, 3, map_axes=2.0), ["map_axes", "2.0"]),
        (lambda: natten_ext.NeighborhoodAttention(8, 2, 3, stride=4), ["stride", "4 > 3"]),
        (lambda: natten_ext.Attention(8, 2, projections=2), ["projections"]),
    ],
)
def test_modules_name_what_is_wrong(make, pieces):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    for piece in pieces:
        assert piece in str(caught.value)


@pytest.mark.parametrize("kind", ["Attention", "L2Attention", "GridAttention", "NeighborhoodAttention"])
def test_signatures_of_modules_are_explicit(kind):
    """And name things as the functions do."""
    module = getattr(natten_ext, kind)
    function = {"Attention": ATTENTION, "L2Attention": L2, "GridAttention": GRID, "NeighborhoodAttention": NA}[kind]
    parameters = inspect.signature(module).parameters
    assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    of_operands = ("query", "key", "value", "return_lse")
    shared = [name for name in inspect.signature(function).parameters if name not in (*of_operands, *MORE)]
    own = ["embed_dim", "num_heads", "qkv_bias", "proj_bias", "proj_drop"]
    own += ["map_axes"] if function in (GRID, NA) else []
    own += ["pad_small"] if function is NA else []
    assert sorted(parameters) == sorted(shared + own)


def test_a_list_is_groups_of_heads_and_a_tuple_is_a_pair():
    """Where 5 rows and 3 columns are meant, a list is something else."""
    q, k, v = torch.randn(3, 1, 8, 9, 2, 4).unbind(0)
    listed, paired = NA(q, k, v, [5, 3]), NA(q, k, v, (5, 3))
    assert not torch.allclose(listed, paired)
    assert torch.equal(listed[..., :1, :], NA(*(x[..., :1, :] for x in (q, k, v)), (5, 5)))
    assert torch.equal(NA(q, k, v, [3, 3]), NA(q, k, v, (3, 3)))  # equal numbers: no difference
    assert torch.equal(NA(q, k, v, 3, [(1, 2), (1, 2)]), NA(q, k, v, 3, (1, 2)))
