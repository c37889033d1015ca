"""Records of attention calls: what is in them, and which calls make one."""

from __future__ import annotations

import pytest
import torch

import natten_ext
from natten_ext import compat

SEQUENCE, MAP = torch.zeros(2, 6, 2, 8), torch.zeros(2, 4, 6, 2, 8)


def test_a_record_of_each_function():
    few = SEQUENCE[:, :5].to(torch.bfloat16)
    with natten_ext.record_calls() as calls:
        natten_ext.attention(few, *[SEQUENCE.to(torch.bfloat16)] * 2, scale=0.5)
        natten_ext.l2_attention(*[SEQUENCE] * 3, backend="reference")
        natten_ext.grid_attention(*[MAP] * 3, (2, 3), bias=torch.zeros(2, 3, 5), score="l2")
        natten_ext.neighborhood_attention(*[MAP] * 3, [(2, 3), 1], dilation=2)
    common = {"device": torch.device("cpu"), "scale": 8**-0.5, "bias": False, "dtype": torch.float32}
    maps = common | {"query_shape": (2, 4, 6, 2, 8), "key_shape": (2, 4, 6, 2, 8), "backend": "cpu"}
    sequences = common | {"key_shape": (2, 6, 2, 8), "neighborhood": "full", "keys": 6}
    assert calls == [
        natten_ext.AttentionCall(
            **sequences
            | {"query_shape": (2, 5, 2, 8), "scale": 0.5, "dtype": torch.bfloat16, "backend": "cpu", "score": "dot"}
        ),
        natten_ext.AttentionCall(**sequences, query_shape=(2, 6, 2, 8), backend="reference", score="l2"),
        natten_ext.AttentionCall(**maps | {"bias": True}, neighborhood="grid", keys=6, score="l2"),
        natten_ext.AttentionCall(**maps, neighborhood="neighborhood", keys=6, score="dot"),
    ]


def test_every_way_to_call():
    modules = [
        natten_ext.Attention(16, 2),
        natten_ext.L2Attention(16, 2),
        natten_ext.GridAttention(16, 2, 2),
        natten_ext.NeighborhoodAttention(16, 2, 3),
    ]
    with natten_ext.record_calls() as calls:
        for module in modules[:2]:
            module(SEQUENCE.flatten(-2))
        for module in modules[2:]:
            module(MAP.flatten(-2))
        natten_ext.na2d(*[MAP] * 3, 3)
        compat.na2d(*[MAP] * 3, 3)
    assert [call.neighborhood for call in calls] == ["full", "full", "grid", *["neighborhood"] * 3]
    assert [call.score for call in calls] == ["dot", "l2", "dot", "dot", "dot", "dot"]


def test_blocks_nest_and_end():
    with natten_ext.record_calls() as outer:
        natten_ext.attention(*[SEQUENCE] * 3)
        with pytest.raises(KeyError), natten_ext.record_calls() as inner:
            natten_ext.l2_attention(*[SEQUENCE] * 3)
            raise KeyError
        natten_ext.attention(*[SEQUENCE] * 3)
    natten_ext.attention(*[SEQUENCE] * 3)
    assert [call.score for call in outer] == ["dot", "l2", "dot"]
    assert [call.score for call in inner] == ["l2"]


def test_refused_calls_leave_no_record():
    with natten_ext.record_calls() as calls:
        with pytest.raises(ValueError):
            natten_ext.attention(*[SEQUENCE] * 3, score="cosine")
        with pytest.raises(RuntimeError):
            natten_ext.attention(*[SEQUENCE.to(torch.float8_e4m3fn)] * 3, backend="cpu")
    assert calls == []


def test_recording_does_not_stop_compilation():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: natten_ext.attention(x, x, x), fullgraph=True, backend="eager")
    x = torch.randn(2, 6, 2, 8)
    with natten_ext.record_calls() as calls:
        torch.testing.assert_close(compiled(x), natten_ext.attention(x, x, x))
    assert len(calls) == 1  # of the call outside
