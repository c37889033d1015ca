"""The check tells right from wrong, and what raises or drops derivatives is caught."""

import types
from dataclasses import replace

import pytest
import torch

from benchmarks import runner
from benchmarks.candidates import Candidate, all_candidates, find_candidates
from benchmarks.check import ALL_HEADS, CHUNK, compare, expect
from benchmarks.floors import Rates
from benchmarks.problem import ORDERS, STEPS, CannotError, make_inputs
from benchmarks.runner import Options, one_line, run
from benchmarks.shapes import GENERAL, SHAPES
from benchmarks.suites import SUITES
from benchmarks.timing import CpuClock

CPU = torch.device("cpu")
RATES = Rates(1e10, 1e9, 1e10)
CANDIDATES = {candidate.name: candidate for candidate in all_candidates("cpu")}
SMOKE = SUITES["smoke"]
_FEW = {"batch": 1, "heads": 2, "head_dim": 4}
SMALL = [
    replace(GENERAL["allin1"], **_FEW, size=(29,), dilations=(3, 5), causal=True),
    replace(GENERAL["gpt-oss"], **_FEW, size=(37,), window=8, stride=3),
    replace(GENERAL["mimi"], **_FEW, size=(37,), window=8, stride=2),
    replace(
        GENERAL["hunyuan-gna"], **_FEW, size=(4, 7, 6), window=(3, 4, 4), causal=(True, False, False), stride=(1, 4, 2)
    ),
    replace(GENERAL["swin-t1"], **_FEW, size=(14, 21)),
    replace(GENERAL["video-swin-t1"], **_FEW, size=(4, 6, 4), window=(2, 3, 4), shift=(1, 1, 3)),
]
"""Blocks of queries that do not fill the map, windows cut at its ends, rows with fewer keys."""
PLAIN = [
    pytest.param(name, shape, id=f"{name}-{shape.name}")
    for name, candidate in CANDIDATES.items()
    for shape in (*SMOKE, *SMALL)
    if name.startswith(("naive", "sdpa") if shape in SMOKE else "naive") and candidate.covers(shape)
]


def ids(shape):
    return shape.name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "shape"), PLAIN)
def test_plain_candidates_are_right_or_raise(name, shape, order):
    candidate = CANDIDATES[name]
    inputs = make_inputs(shape, torch.float32, CPU)
    attend = candidate.prepare(shape, CPU, torch.float32)
    try:
        results = STEPS[order](attend, inputs)
    except (CannotError, RuntimeError) as error:
        # Fused SDPA on a CPU differentiates once, in reverse, and not with respect to its mask.
        assert name == "sdpa"
        assert order in ("double", "tangent") or shape.table, error
        return
    errors, wrong = compare(results, expect(shape, inputs, order), "float32")
    assert not wrong
    assert set(errors) == set(results)


def broken_attend(kind):
    """naive with one flaw."""

    def prepare(shape, device, dtype):
        right = CANDIDATES["naive"].prepare(shape, device, dtype)

        def attend(query, key, value, table):
            output = right(query, key, value, table)
            if kind == "scaled":
                return output * 1.001
            if kind == "one entry":
                flaw = torch.zeros_like(output)
                flaw[0, 0, 0, 0, 0] = 1.0
                return output + flaw
            if kind == "not a number":
                return output / torch.ones_like(output).index_fill(0, torch.tensor([0]), 0.0)
            if kind == "detached":
                return output.detach()
            if kind == "no second derivative":
                return Once.apply(query, key, value, output)
            if kind == "half a second derivative":
                return right(query, key, value.detach() * 2, table) - right(query, key, value, table)
            raise NotImplementedError("no such kernel:\n  really")

        return attend

    return Candidate(f"broken {kind}", "ours", prepare)


class Once(torch.autograd.Function):
    """An output whose gradients carry no graph, as of many fused kernels."""

    @staticmethod
    def forward(ctx, query, key, value, output):
        ctx.save_for_backward(query, key, value)
        return output.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *(x * 0 for x in ctx.saved_tensors), grad


def rows_of(candidate, shape, order):
    options = Options(CPU, "float32", (order,), repeats=1, memory=False, progress=False)
    ((_, rows),) = run([shape], [candidate], options, RATES)
    return rows


@pytest.mark.parametrize(
    ("kind", "order", "status", "reason"),
    [
        ("scaled", "forward", "wrong", "output is off by 1.0e-03"),
        ("one entry", "forward", "wrong", "output is off by"),
        ("not a number", "forward", "wrong", "output is off by"),
        ("detached", "backward", "cannot", "the output is detached from its inputs"),
        ("no second derivative", "double", "cannot", "second derivative silently missing for weight"),
        ("half a second derivative", "double", "wrong", "grad_"),
        ("that raises", "forward", "cannot", "NotImplementedError: no such kernel: really"),
    ],
)
def test_flaws_are_seen(kind, order, status, reason):
    (row,) = rows_of(broken_attend(kind), SMOKE[1], order)
    assert (row.status, row.timing, row.failed) == (status, None, True)
    assert reason in row.reason


def test_a_broken_cuda_context_is_not_blamed_on_the_next_candidate(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    shape, candidate = SMOKE[1], broken_attend("that raises")
    attends = {candidate.name: candidate.prepare(shape, CPU, torch.float32)}
    inputs = make_inputs(shape, torch.float32, CPU)
    options = Options(types.SimpleNamespace(type="cuda"), "float32", ("forward",))
    cell = runner._Cell(shape, "forward", inputs, [candidate], attends, options, lambda activity, name: None)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cell.check(CpuClock())


def test_detached_first_gradients_are_called_a_missing_second_derivative():
    class Detached(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            return query + key + value

        @staticmethod
        def backward(ctx, grad):
            return (grad.detach(),) * 3

    inputs = make_inputs(replace(SHAPES["seq-65"], batch=1), torch.float32, CPU)
    with pytest.raises(CannotError, match="second derivative silently missing"):
        STEPS["double"](lambda q, k, v, table: Detached.apply(q, k, v), inputs)


def test_a_right_candidate_is_timed_and_compared_with_naive():
    options = Options(CPU, "float32", ("forward",), repeats=2, memory=False, progress=False)
    candidates = find_candidates(CPU, torch.float32, [], ("naive",))
    ((_, rows),) = run([SMOKE[0]], candidates, options, RATES)
    assert [row.candidate for row in rows] == ["naive", "naive-mask", "naive-loop"]
    assert all(row.status == "ok" and len(row.timing.samples) == (1 if row.timing.hopeless else 2) for row in rows)
    assert max(row.ratio for row in rows) == 1.0
    assert rows[0].floor_percent == pytest.approx(100 * rows[0].floor / rows[0].timing.median)


def test_large_shapes_are_checked_on_two_heads(monkeypatch):
    monkeypatch.setitem(ALL_HEADS, "cpu", 0)
    shape = replace(SMOKE[0], heads=4, batch=2)
    inputs = make_inputs(shape, torch.float32, CPU)
    expected = expect(shape, inputs, "double")
    assert expected.heads == [0, 3]
    results = STEPS["double"](CANDIDATES["naive"].prepare(shape, CPU, torch.float32), inputs)
    assert compare(results, expected, "float32")[1] == ""
    results["penalty_table"][3, 0, 0] += 1
    assert "penalty_table is off by" in compare(results, expected, "float32")[1]


def test_the_reference_in_chunks_of_the_batch_is_the_reference(monkeypatch):
    shape = replace(SMOKE[0], batch=3)
    inputs = make_inputs(shape, torch.float32, CPU)
    whole = expect(shape, inputs, "double").results
    monkeypatch.setitem(CHUNK, "cpu", 1)
    for name, chunked in expect(shape, inputs, "double").results.items():
        torch.testing.assert_close(chunked, whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SMOKE, ids=ids)
def test_naive_passes_in_every_dtype(shape, dtype):
    inputs = make_inputs(shape, dtype, CPU)
    for order in ORDERS:
        results = STEPS[order](CANDIDATES["naive"].prepare(shape, CPU, dtype), inputs)
        assert compare(results, expect(shape, inputs, order), str(dtype).removeprefix("torch."))[1] == ""


def test_peers_refuse_dense_masks_of_large_maps():
    with pytest.raises(CannotError, match=r"dense 16384 x 16384 matrix per head takes \d"):
        CANDIDATES["sdpa"].prepare(SHAPES["nat-128"], CPU, torch.float32)


def test_natten_says_why_not():
    with pytest.raises(CannotError, match=r"not installed|not a neighborhood|no full attention"):
        CANDIDATES["natten"].prepare(SHAPES["cifar-d1"], CPU, torch.float32)


def test_long_messages_become_one_line():
    assert one_line(ValueError("x" * 500)).endswith("...")
    assert len(one_line(ValueError("x" * 500))) == 160
    assert one_line(CannotError("why")) == "why"
    assert one_line(RuntimeError()) == "RuntimeError: (no message)"
