"""What is particular to the triton backend: when it can run, tiles smaller than problems, streamed channels."""

from __future__ import annotations

import importlib
import sys
import threading
import weakref
from dataclasses import replace

import pytest
import torch

import natten_ext
from natten_ext.backends.triton import backend
from natten_ext.checks import windows_of
from natten_ext.orders import DOUBLE_BACKWARD, FORWARD
from tests.operators.budget import assert_equal_to_rounding
from tests.operators.cases import (
    Case,
    cotangents_of,
    derivatives,
    find,
    forward,
    grad_output_of,
    inputs_of,
    oracle_derivatives,
)
from tests.operators.conftest import Target
from tests.operators.interpreter import python_without_interpreter
from tests.operators.test_log_sum_exp import compare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(backend, "_missing", backend._missing.__wrapped__)  # without what it answered before
    assert "natten_ext[triton]" in backend.cannot_run(torch.device("cpu"), torch.float32, 8)


@pytest.mark.slow
def test_cpu_tensors_need_the_interpreter_and_it_needs_nothing_of_these_tests():
    """Triton 3.6's own cannot count blocks with numpy 2.4. Nothing imports Triton before it is used."""
    pytest.importorskip("triton")
    code = """
import os, sys
import natten_ext, torch
q = torch.randn(1, 6, 6, 1, 8)
print(natten_ext.backends.choice.choose('auto', q.device, torch.float32, 8, 'full', 256))
try: natten_ext.attention(q.flatten(1, 2), q.flatten(1, 2), q.flatten(1, 2), backend='triton')
except RuntimeError as error: print(error)
print('triton' in sys.modules)
os.environ['TRITON_INTERPRET'] = '1'
one, two = (natten_ext.neighborhood_attention(q, q, q, 3, backend=name) for name in ('triton', 'reference'))
print(float((one - two).abs().max()) < 1e-5)
"""
    done = python_without_interpreter("-c", code)
    assert done.returncode == 0, done.stderr
    chosen, message, imported, right = done.stdout.splitlines()
    assert chosen == "cpu" and "TRITON_INTERPRET=1" in message
    assert (imported, right) == ("False", "True")


@pytest.mark.parametrize(
    ("problem", "reason"),
    [(("xpu", torch.float32, 8), "xpu"), (("cpu", torch.int8, 8), "int8"), (("cpu", torch.float32, 257), "256")],
)
def test_reasons(problem, reason, monkeypatch):
    device, *rest = problem
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    assert reason in backend.cannot_run(torch.device(device), *rest)


def test_auto_never_interprets(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(natten_ext.backends.choice, "_override", None)
    assert natten_ext.backends.choice.choose(None, torch.device("cpu"), torch.float32, 8, "full", 256) == "cpu"
    assert natten_ext.backends.choice.choose(None, torch.device("cpu"), torch.float16, 8, "full", 256) == "cpu"
    assert natten_ext.backends.choice.choose(None, torch.device("cpu"), torch.float16, 300, "full", 256) == "reference"


def check(case) -> None:
    if backend.cannot_run(DEVICE, torch.float64, case.head_dim):
        pytest.skip("the triton backend cannot run here")
    inputs = inputs_of(case)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    true = oracle_derivatives(case, inputs, grad_output, cotangents)
    results = derivatives(
        lambda leaves: forward(case, leaves, "triton"),
        {name: tensor.to(DEVICE) for name, tensor in inputs.items()},
        grad_output.to(DEVICE),
        {name: tensor.to(DEVICE) for name, tensor in cotangents.items()},
    )
    assert_equal_to_rounding(results, true)


@pytest.mark.parametrize(
    "case", [find("na-8x6-k4", bias=True, score="l2", shape=(1, 6, 5, 1, 5)), find("full-dim-24")], ids=str
)
def test_several_tiles_and_blocks(case):
    """The smallest tiles, so that a small problem has several of them, with borders in all of them."""
    configs = pytest.importorskip("natten_ext.backends.triton.configs")
    with configs.forced(configs.Config(16, 16, 4, 1)):
        check(case)


@pytest.mark.parametrize("chunk", [0, 16], ids=["held", "streamed"])
def test_the_log_sum_exp_in_several_tiles(chunk):
    configs = pytest.importorskip("natten_ext.backends.triton.configs")
    if backend.cannot_run(DEVICE, torch.float64, 8):
        pytest.skip("the triton backend cannot run here")
    case = find("na-8x6-k4", bias=True, score="l2", shape=(1, 6, 5, 1, 18))
    with configs.forced(configs.Config(16, 16, 4, 1, chunk)):
        compare(Target("triton", DEVICE), case, inputs_of(case))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["output", "lse", "both"])
def test_tangents_alone(wanted):
    """One launch, which has no rows' numbers to write and no other gradient."""
    plans = pytest.importorskip("natten_ext.backends.triton.plans")
    x = torch.empty(1, 8, 8, 1, 16, device="meta")
    lse = torch.empty(2, 1, 1, 8, 8, device="meta")
    choices = [1, 1, 4, 4], False, 1.0, [*wanted, *[False] * 4]
    operands = DOUBLE_BACKWARD.operands(x, x, x, None, x, None, x, x, x, None, x, lse, *choices)
    launch, results = plans.planned(DOUBLE_BACKWARD, operands)
    ((kernel, _, arguments, _),) = launch.launches
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    assert kernel.fn.__name__ == "double_query_kernel"
    assert given["numbers"] is given["grad_query"] is None
    assert (given["grad_grad_output"] is not None, given["grad_grad_lse"] is not None) == wanted
    shapes = [x.shape if wanted[0] else None, lse.shape[1:] if wanted[1] else None, *[None] * 4]
    assert [result if result is None else result.shape for result in results] == shapes


WHOLE = [
    Case("whole-grid", "grid", (2, 4, 8, 2, 8), window=(4, 8), bias=True),
    Case("whole-grid-l2", "grid", (1, 4, 16, 1, 8), window=(4, 8), score="l2"),
    Case("whole-full", "full", (1, 32, 1, 8), score="l2"),
]


@pytest.mark.parametrize("case", WHOLE, ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "rest"])
def test_tiles_that_fit_and_that_do_not(case, whole, monkeypatch):
    """Where tiles and blocks fit, nothing is masked; masks change nothing there."""
    launch = pytest.importorskip("natten_ext.backends.triton.launch")
    monkeypatch.setattr(importlib.import_module("natten_ext.backends.triton.plans"), "_plans", {})
    statics = []
    start = launch.Launch.start

    def recorded(self, kernel, programs, arguments, config, **constants):
        if "S" in constants:
            statics.append(constants["S"])
            constants["S"] = replace(constants["S"], whole=whole)
        return start(self, kernel, programs, arguments, config, **constants)

    monkeypatch.setattr(launch.Launch, "start", recorded)
    with launch.configs.forced(launch.configs.Config(16, 16, 4, 1)):
        check(case)
    assert len(statics) >= 5 and all(static.whole for static in statics)


def test_streamed_channels():
    """Rows loaded chunk by chunk, as for head_dim 256."""
    configs = pytest.importorskip("natten_ext.backends.triton.configs")
    with configs.forced(configs.Config(32, 16, 4, 1, chunk=32)):
        check(find("grid-4x4-dim-256", bias=True, score="l2", shape=(1, 4, 4, 1, 72)))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_follows_torch(precision):
    pytest.importorskip("triton")
    from natten_ext.backends.support import full_precision

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        assert full_precision(torch.float32) == (precision == "ieee")
        assert full_precision(torch.bfloat16)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_more_programs_than_a_launch_can_have():
    launch = pytest.importorskip("natten_ext.backends.triton.launch")
    query = torch.empty(2**20, 64, 2**6, 1, device="meta")
    problem = launch.Launch(FORWARD.operands(query, query, query, None, [0], False, 1.0, False))
    with pytest.raises(RuntimeError, match="programs"):
        problem.start(None, 2**31, (), launch.configs.Config(16, 16, 4, 1))


def test_what_is_kept_is_not_allocated_by_the_calling_thread(monkeypatch):
    """That may be warming up a CUDA graph (torch.compile with "reduce-overhead"), whose memory nothing may keep."""
    on_device = pytest.importorskip("natten_ext.backends.triton.on_device")
    threads = []
    original = torch.tensor

    def spy(*arguments, **options):
        threads.append(threading.get_ident())
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "tensor", spy)
    rows = ((3, 5, 1, 2), (3, 5, 1, 97))

    def make(rows):
        return (rows,)

    (kept,) = on_device.kept_on(torch.device("cpu"), make, rows)
    assert kept.tolist() == [list(row) for row in rows] and kept.dtype == torch.int32
    assert on_device.kept_on(torch.device("cpu"), make, rows)[0] is kept
    assert len(threads) == 1 and threads[0] != threading.get_ident()


def test_first_use_while_a_graph_is_captured(monkeypatch):
    """Nothing can be copied to a device then; and what a graph has read stays, whatever else comes."""
    plans = pytest.importorskip("natten_ext.backends.triton.plans")
    if not plans.INTERPRETED:
        pytest.skip("a device that captures is pretended")
    capturing = False
    monkeypatch.setattr(plans.on_device, "capturing", lambda on_gpu: capturing)
    monkeypatch.setattr(plans, "_plans", {})
    plans.on_device.kept_on.cache_clear()

    def run(size: int) -> None:
        x = torch.zeros(1, size, size, 1, 4)
        plans.run(FORWARD, (x, x, x, None, windows_of(2, 1, 2, size // 2).encode(), False, 1.0, False))

    def kept() -> weakref.ref:
        ((tensor,),) = list(plans._plans.values())[-1].kept
        return weakref.ref(tensor)

    run(4)
    graph = kept()
    capturing = True
    with pytest.raises(RuntimeError, match="run it once before the capture"):
        run(6)
    run(4)
    capturing = False
    run(8)
    eager = kept()
    plans._plans.clear()
    plans.on_device.kept_on.cache_clear()
    assert (graph() is not None, eager()) == (True, None)


def test_one_stage_where_the_compiler_cannot_overlap_iterations(monkeypatch):
    """Triton before 3.8 on compute capability 10.x; every GPU without a section has a configuration."""
    configs = pytest.importorskip("natten_ext.backends.triton.configs")

    def stages(section: str, version: str) -> set[int]:
        monkeypatch.setattr(configs.triton, "__version__", version)
        configs.pipelines.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(configs, "architecture", lambda device: section)
            return {
                configs.lookup(None, step, shape_class, dtype, full, channels).stages
                for step in configs.STEPS
                for shape_class in ("full", "grid", "windows", "neighborhood")
                for dtype, full in ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False))
                for channels in configs.CHANNELS
            }

    assert stages("sm_100", "3.6.0") == stages("sm_103", "3.7.1") == {1}
    assert stages("sm_100", "3.8.0") == stages("sm_120", "3.6.0") == stages("sm_90", "3.6.0+git") == {1, 2}
    with configs.forced(configs.Config(64, 64, 4, 3)):
        assert (stages("sm_103", "3.6.0"), stages("sm_90", "3.6.0")) == ({1}, {3})
    configs.pipelines.cache_clear()
