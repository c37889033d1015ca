"""What runs, what can't, and why: `backends`, `use_backend`, the environment variable."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import natten_ext
from natten_ext import dispatch, fused


def a_case(**options) -> torch.Tensor:
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 6, 2, 8).unbind(0)
    return natten_ext.attention(query, key, value, **options)


@pytest.fixture
def chosen(monkeypatch) -> list[str]:
    """Names of the backends that `choose` answered with during the test."""
    names: list[str] = []
    original = dispatch.choose

    def spy(*arguments):
        names.append(original(*arguments))
        return names[-1]

    monkeypatch.setattr(dispatch, "choose", spy)
    monkeypatch.setattr(dispatch, "_override", None)
    return names


def test_every_backend_has_a_status():
    statuses = natten_ext.backends()
    names = [status.name for status in statuses]
    assert "reference" in names and "cpu" in names and len(set(names)) == len(names)
    for status in statuses:
        assert isinstance(status.available, bool)
        assert status.available == (status.reason == ""), status


def test_reference_is_always_available():
    for device in ("cpu", "cuda", "meta"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert natten_ext.backends(device, dtype, 1000)[-1] == natten_ext.BackendStatus("reference", True, "")


def test_auto_on_the_cpu(chosen):
    a_case()
    a_case(backend="auto")
    expected = "cpu" if any(s.name == "cpu" and s.available for s in natten_ext.backends()) else "reference"
    assert chosen == [expected, expected]


def test_asking_by_name(chosen):
    available = [status.name for status in natten_ext.backends(head_dim=8) if status.available]
    for name in available:
        a_case(backend=name)
    assert chosen == available


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpu_backends_on_the_cpu_raise(name):
    if any(s.name == name and s.available for s in natten_ext.backends()):
        pytest.skip(f"{name} runs on the CPU here")
    with pytest.raises((RuntimeError, ValueError), match=name):
        a_case(backend=name)


def test_use_backend_nests_and_ends(chosen):
    with natten_ext.use_backend("reference"):
        a_case()
        with natten_ext.use_backend("auto"):
            a_case()
        a_case()
    a_case()
    auto = chosen[1]
    assert chosen == ["reference", auto, "reference", auto]


def test_use_backend_ends_after_an_error(chosen):
    with pytest.raises(KeyError), natten_ext.use_backend("reference"):
        raise KeyError
    a_case()
    assert chosen == [dispatch.choose("auto", "cpu", torch.float32, 8)] * 2


def test_an_argument_goes_before_use_backend(chosen):
    with natten_ext.use_backend("auto"):
        a_case(backend="reference")
    assert chosen == ["reference"]


def test_use_backend_with_an_unknown_name():
    with pytest.raises(ValueError, match="nonsense"), natten_ext.use_backend("nonsense"):
        pass


def test_backends_agree():
    results = [a_case(backend=s.name) for s in natten_ext.backends(head_dim=8) if s.available]
    for result in results:
        torch.testing.assert_close(result, results[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_environment_variable():
    """Read when the package is imported, and a wrong name is an error that names the variable."""

    def override(value: str) -> subprocess.CompletedProcess:
        code = "import natten_ext.dispatch as d; print(d._override)"
        environment = os.environ | {"NATTEN_EXT_BACKEND": value}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert override("reference").stdout.strip() == "reference"
    wrong = override("nonsense")
    assert wrong.returncode != 0 and "NATTEN_EXT_BACKEND" in wrong.stderr and "nonsense" in wrong.stderr


@pytest.mark.parametrize(("value", "expected"), [("auto", "auto"), ("", None)])
def test_environment_variable_that_chooses_nothing(monkeypatch, value, expected):
    monkeypatch.setenv("NATTEN_EXT_BACKEND", value)
    assert dispatch._read_environment() == expected


def test_gpus_that_cannot_be_used(monkeypatch):
    """A torch with CUDA on a machine without a GPU (where asking for the device raises), and an old GPU."""
    if not torch.cuda.is_available():
        assert fused.cannot_use_gpu() == "torch finds no CUDA device"
        assert all(not status.available for status in natten_ext.backends("cuda") if status.name != "reference")
        with pytest.warns(RuntimeWarning, match="unfused on cuda"):
            monkeypatch.setattr(dispatch, "_warned", set())
            assert dispatch.choose(None, "cuda", torch.float32, 8) == "reference"
    monkeypatch.setattr(fused, "_no_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(fused, "capability_of", lambda device: (7, 5))
    assert fused.cannot_use_gpu() == "the GPU must have compute capability 8.0 or later, got 7.5"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cpu_backend_refuses_other_devices():
    query = torch.randn(1, 4, 1, 8, device="cuda")
    with pytest.raises(RuntimeError, match="cpu"):
        natten_ext.attention(query, query, query, backend="cpu")


def test_falling_back_on_an_accelerator_warns_once(monkeypatch):
    """No silent slow path: `auto` on a device without a fused backend says why, once."""
    monkeypatch.setattr(dispatch, "_warned", set())
    if any(s.available for s in natten_ext.backends("xpu") if s.name != "reference"):
        pytest.skip("a fused backend runs on xpu")
    with pytest.warns(RuntimeWarning, match="xpu"):
        assert dispatch.choose("auto", "xpu", torch.float32, 8) == "reference"
    assert len(dispatch._warned) == 1
    dispatch.choose("auto", "xpu", torch.float32, 8)
    assert len(dispatch._warned) == 1
