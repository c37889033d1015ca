"""What runs, what can't, and why: `backends`, `use_backend`, the environment variable."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import natten_ext
from natten_ext import geometry
from natten_ext.backends import choice, support
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
    tested = {target.backend for target in conftest.targets(with_reference=True)}
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
    available = [status.name for status in natten_ext.list_backends(head_dim=8) if status.available]
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
                assert choice.choose("auto", "cpu", dtype, head_dim, kind) == first


@pytest.mark.parametrize(
    ("neighborhood", "dtype", "head_dim", "first"),
    [
        ("full", torch.bfloat16, 16, "triton"),
        ("grid", torch.float16, 16, "triton"),
        ("grid", torch.bfloat16, 15, "cuda"),
        ("full", torch.float32, 65, "triton"),
        ("grid", torch.float32, 64, "cuda"),
        ("neighborhood", torch.bfloat16, 64, "cuda"),
        ("full", torch.float64, 64, "cuda"),
    ],
)
def test_the_order_on_a_gpu_is_what_was_measured(monkeypatch, neighborhood, dtype, head_dim, first):
    """`list_backends` and `auto` agree; where the first can't run, the other does."""
    can = {"cuda", "triton"}
    for name in can:
        monkeypatch.setattr(choice.FUSED[name], "cannot_run", lambda *problem, name=name: "" if name in can else "no")
    second = "cuda" if first == "triton" else "triton"
    statuses = natten_ext.list_backends("cuda", dtype, head_dim, neighborhood)
    assert [status.name for status in statuses] == [first, second, "cpu", "reference"]
    assert choice.choose(None, "cuda", dtype, head_dim, neighborhood) == first
    can.remove(first)
    assert choice.choose(None, "cuda", dtype, head_dim, neighborhood) == second


@pytest.mark.parametrize("arguments", [{"dtype": "float32"}, {"dtype": None}, {"head_dim": "64"}, {"head_dim": 64.0}])
def test_backends_names_an_argument_of_another_type(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(TypeError, match=f"{name} must be .*, got {value!r}"):
        natten_ext.list_backends("cpu", **arguments)


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
    results = [a_case(backend=s.name) for s in natten_ext.list_backends(head_dim=8) if s.available]
    for result in results:
        torch.testing.assert_close(result, results[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_environment_variable():
    """Read when the package is imported, and a wrong name is an error that names the variable."""

    def override(value: str) -> subprocess.CompletedProcess:
        code = "import natten_ext.backends.choice as d; print(d._override)"
        environment = os.environ | {"NATTEN_EXT_BACKEND": value}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert override("reference").stdout.strip() == "reference"
    wrong = override("nonsense")
    assert wrong.returncode != 0 and "NATTEN_EXT_BACKEND" in wrong.stderr and "nonsense" in wrong.stderr


@pytest.mark.parametrize(("value", "expected"), [("auto", "auto"), ("", None)])
def test_environment_variable_that_chooses_nothing(monkeypatch, value, expected):
    monkeypatch.setenv("NATTEN_EXT_BACKEND", value)
    assert choice._read_environment() == expected


def test_gpus_that_cannot_be_used(monkeypatch):
    """A torch with CUDA on a machine without a GPU (where asking for the device raises), and an old GPU."""
    if not torch.cuda.is_available():
        assert support.cannot_use_gpu() == "torch finds no CUDA device"
        assert all(not status.available for status in natten_ext.list_backends("cuda") if status.name != "reference")
        with pytest.warns(RuntimeWarning, match="unfused on cuda"):
            monkeypatch.setattr(choice, "_warned", set())
            assert choice.choose(None, "cuda", torch.float32, 8, "full") == "reference"
    monkeypatch.setattr(support, "_no_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(support, "capability_of", lambda device: (7, 5))
    assert support.cannot_use_gpu() == "the GPU must have compute capability 8.0 or later, got 7.5"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cpu_backend_refuses_other_devices():
    query = torch.randn(1, 4, 1, 8, device="cuda")
    with pytest.raises(RuntimeError, match="cpu"):
        natten_ext.attention(query, query, query, backend="cpu")


def test_falling_back_on_an_accelerator_warns_once(monkeypatch):
    """No silent slow path: `auto` on a device without a fused backend says why, once."""
    monkeypatch.setattr(choice, "_warned", set())
    if any(s.available for s in natten_ext.list_backends("xpu") if s.name != "reference"):
        pytest.skip("a fused backend runs on xpu")
    with pytest.warns(RuntimeWarning, match="xpu"):
        assert choice.choose("auto", "xpu", torch.float32, 8, "full") == "reference"
    assert len(choice._warned) == 1
    choice.choose("auto", "xpu", torch.float32, 8, "full")
    assert len(choice._warned) == 1
