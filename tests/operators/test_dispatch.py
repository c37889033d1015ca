"""What runs, what can't, and why: `backends`, `use_backend`, the environment variable."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

import natten_ext
from natten_ext import geometry
from natten_ext.backends import choice, cuda, support
from tests.operators import conftest


def a_case(**options) -> torch.Tensor:
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 6, 2, 8).unbind(0)
    return natten_ext.attention(query, key, value, **options)


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch) -> None:
    monkeypatch.setattr(choice, "_override", None)


def test_every_backend_has_a_status():
    statuses = natten_ext.list_backends()
    names = [status.name for status in statuses]
    assert "reference" in names and "cpu" in names and len(set(names)) == len(names)
    for status in statuses:
        assert isinstance(status.available, bool)
        assert status.available == (status.reason == ""), status


@pytest.mark.skipif("NATTEN_EXT_TEST_BACKENDS" in os.environ, reason="only some backends are asked for")
def test_every_backend_is_tested_here(request):
    """Whatever else is collected: a backend that is asked for before its emulator is there has no tests at all."""
    missing = {"triton"} if importlib.util.find_spec("triton") is None else set()
    tested = {target.backend for kind in geometry.KINDS for target in conftest.targets(with_reference=True, kind=kind)}
    assert tested == {*choice.NAMES} - missing


def test_reference_is_always_available():
    for device in ("cpu", "cuda", "meta"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert natten_ext.BackendStatus("reference", True, "") in natten_ext.list_backends(device, dtype, 1000)


def chosen(calls: list[natten_ext.AttentionCall]) -> list[str]:
    return [call.backend for call in calls]


def test_auto_on_the_cpu():
    with natten_ext.record_calls() as calls:
        a_case()
        a_case(backend="auto")
    assert chosen(calls) == ["cpu", "cpu"]


def test_asking_by_name():
    available = [s.name for s in natten_ext.list_backends(head_dim=8, neighborhood="full") if s.available]
    with natten_ext.record_calls() as calls:
        for name in available:
            a_case(backend=name)
    assert chosen(calls) == available


def test_auto_takes_the_first_available_backend():
    """Also where kernels made for GPUs run on the CPU, which `auto` does not take, and beyond all fused kernels."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        for head_dim in (8, 300):
            for kind in geometry.KINDS:
                first = next(s.name for s in natten_ext.list_backends("cpu", dtype, head_dim, kind) if s.available)
                assert choice.choose("auto", torch.device("cpu"), dtype, head_dim, kind, keys=256) == first


@pytest.mark.parametrize(
    ("neighborhood", "dtype", "head_dim", "keys", "order"),
    [
        ("full", torch.bfloat16, 16, 256, ["triton", "cuda", "matmul"]),
        ("grid", torch.float16, 16, 256, ["triton", "cuda", "matmul"]),
        ("grid", torch.bfloat16, 15, 256, ["cuda", "triton", "matmul"]),
        ("full", torch.float32, 65, 256, ["matmul", "cuda", "triton"]),
        ("grid", torch.float32, 65, 1024, ["matmul", "cuda", "triton"]),
        ("grid", torch.float32, 65, 1025, ["cuda", "triton", "matmul"]),
        ("full", torch.float32, 65, 4096, ["matmul", "cuda", "triton"]),
        ("full", torch.float32, 64, 256, ["cuda", "triton", "matmul"]),
        ("grid", torch.float32, 65, 127, ["cuda", "triton", "matmul"]),
        ("neighborhood", torch.bfloat16, 64, 256, ["cuda", "triton", "matmul"]),
        ("neighborhood", torch.float32, 64, 256, ["cuda", "triton", "matmul"]),
        ("full", torch.float64, 64, 256, ["cuda", "triton", "matmul"]),
    ],
)
def test_the_order_on_a_gpu(monkeypatch, neighborhood, dtype, head_dim, keys, order):
    """`list_backends` and `auto` agree; where the first can't run, the next does."""
    can = {"cuda", "triton", "matmul"}
    for name in order:
        monkeypatch.setattr(choice.FUSED[name], "cannot_run", lambda *problem, name=name: "" if name in can else "no")
    statuses = natten_ext.list_backends("cuda", dtype, head_dim, neighborhood, keys)
    assert [status.name for status in statuses] == [*order, "cpu", "reference"]
    available = {status.name for status in statuses if status.available}
    assert available == {"cuda", "triton", "reference"} | ({"matmul"} if neighborhood != "neighborhood" else set())
    problem = (torch.device("cuda"), dtype, head_dim, neighborhood, keys)
    assert choice.choose(None, *problem) == order[0]
    can.discard(order[0])
    assert choice.choose(None, *problem) == order[1]


def test_matmul_takes_no_neighborhoods():
    query = torch.randn(1, 5, 5, 2, 8)
    with pytest.raises(RuntimeError, match=r"matmul.*neighborhood must be one of \('full', 'grid'\), got neighborhood"):
        natten_ext.neighborhood_attention(query, query, query, 3, backend="matmul")


@pytest.mark.parametrize(
    "arguments", [{"dtype": "float32"}, {"dtype": None}, {"head_dim": "64"}, {"head_dim": 64.0}, {"keys": 9.0}]
)
def test_backends_names_an_argument_of_another_type(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(TypeError, match=f"{name} must be .*, got {value!r}"):
        natten_ext.list_backends("cpu", **arguments)


@pytest.mark.parametrize("name", ["head_dim", "keys"])
def test_backends_names_a_number_that_is_too_small(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        natten_ext.list_backends("cpu", **{name: 0})


def test_an_unknown_kind_of_neighborhood():
    with pytest.raises(ValueError, match="neighborhood must be one of"):
        natten_ext.list_backends(neighborhood="window")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpu_backends_on_the_cpu_raise(name):
    if any(s.name == name and s.available for s in natten_ext.list_backends()):
        pytest.skip(f"{name} runs on the CPU here")
    with pytest.raises((RuntimeError, ValueError), match=name):
        a_case(backend=name)


def test_use_backend_nests_and_ends():
    with natten_ext.record_calls() as calls:
        with natten_ext.use_backend("reference"):
            a_case()
            with natten_ext.use_backend("auto"):
                a_case()
            a_case()
        a_case()
    assert chosen(calls) == ["reference", "cpu", "reference", "cpu"]


def test_use_backend_ends_after_an_error():
    with pytest.raises(KeyError), natten_ext.use_backend("reference"):
        raise KeyError
    with natten_ext.record_calls() as calls:
        a_case()
    assert chosen(calls) == ["cpu"]


def test_an_argument_goes_before_use_backend():
    with natten_ext.record_calls() as calls, natten_ext.use_backend("auto"):
        a_case(backend="reference")
    assert chosen(calls) == ["reference"]


def test_use_backend_with_an_unknown_name():
    with pytest.raises(ValueError, match="nonsense"), natten_ext.use_backend("nonsense"):
        pass


def test_backends_agree():
    statuses = natten_ext.list_backends(head_dim=8, neighborhood="full")
    results = [a_case(backend=s.name) for s in statuses if s.available]
    for result in results:
        torch.testing.assert_close(result, results[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_environment_variable():
    """Read when the package is imported."""

    def override(value: str) -> str:
        code = "import natten_ext.backends.choice as d; print(d._override)"
        environment = os.environ | {"NATTEN_EXT_BACKEND": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert [override(value) for value in ("reference", "auto", "")] == ["reference", "auto", "None"]


def test_environment_variable_with_an_unknown_name(monkeypatch):
    """An error that names the variable, for what does not name a backend itself."""
    monkeypatch.setattr(choice, "_override", "nonsense")
    for use in (a_case, choice.check_environment):
        with pytest.raises(ValueError, match=r"NATTEN_EXT_BACKEND must be one of \('auto', .*, got 'nonsense'"):
            use()
    with natten_ext.record_calls() as calls:
        a_case(backend="reference")
        with natten_ext.use_backend("cpu"):
            a_case()
    assert chosen(calls) == ["reference", "cpu"]


def test_a_missing_library_is_named_with_its_variable(monkeypatch, tmp_path):
    missing = str(tmp_path / "missing.so")
    monkeypatch.setenv(cuda.EMULATOR_VARIABLE, missing)
    monkeypatch.setattr(cuda, "_not_loaded", cuda._not_loaded.__wrapped__)  # here it may be known already
    reason = f"NATTEN_EXT_CUDA_EMULATOR is {missing!r}, which does not load: {missing}: "
    with pytest.raises(RuntimeError, match=re.escape(f"backend 'cuda' cannot run this: {reason}")):
        a_case(backend="cuda")
    assert a_case().shape == (2, 6, 2, 8)


def test_gpus_that_cannot_be_used(monkeypatch):
    """A torch with CUDA on a machine without a GPU (where asking for the device raises), and an old GPU."""
    if not torch.cuda.is_available():
        assert support.cannot_use_gpu(torch.device("cuda")) == "torch finds no CUDA device"
        assert all(not status.available for status in natten_ext.list_backends("cuda") if status.name != "reference")
        with pytest.warns(RuntimeWarning, match="unfused on cuda"):
            monkeypatch.setattr(choice, "_warned", set())
            assert choice.choose(None, torch.device("cuda"), torch.float32, 8, "neighborhood", 49) == "reference"
        assert choice.choose(None, torch.device("cuda"), torch.float32, 8, "full", 49) == "matmul"
    monkeypatch.setattr(support, "_no_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(support, "capability_of", lambda device: [(7, 5), (9, 0)][device])
    for device in ("cuda", "cuda:0"):
        refused = support.cannot_use_gpu(torch.device(device))
        assert refused == "the GPU must have compute capability 8.0 or later, got 7.5"
    assert support.cannot_use_gpu(torch.device("cuda:1")) == ""  # not the current one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cpu_backend_refuses_other_devices():
    query = torch.randn(1, 4, 1, 8, device="cuda")
    with pytest.raises(RuntimeError, match="cpu"):
        natten_ext.attention(query, query, query, backend="cpu")


def test_falling_back_on_an_accelerator_warns_once(monkeypatch):
    """No silent slow path: `auto` on a device without a fused backend says why, once."""
    monkeypatch.setattr(choice, "_warned", set())
    with pytest.warns(RuntimeWarning, match="xpu"):
        assert choice.choose("auto", torch.device("xpu"), torch.float32, 8, "neighborhood", 49) == "reference"
    assert len(choice._warned) == 1
    choice.choose("auto", torch.device("xpu"), torch.float32, 8, "neighborhood", 49)
    assert len(choice._warned) == 1
