"""nvcc compiles the kernels for several GPUs, and those that the named shapes use neither spill nor need a stack."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import setup
from benchmarks.kernels import cuda_resources
from natten_ext.backends import cuda
from tests.samples import TEST_ALL

ROOT = Path(__file__).resolve().parents[2]

CAPABILITIES = ("8.0", "9.0", "10.0")

# Files and modes, the longest first: bfloat16 for every capability, and of the others what is nearest to spilling.
# docs/cuda.md has the rest.
JOBS = [("double_backward", "BfloatMode", False, capability) for capability in CAPABILITIES]
JOBS += [("double_backward", "Tf32Mode", False, "8.0")]
JOBS += [("backward", "BfloatMode", False, capability) for capability in CAPABILITIES]
JOBS += [("backward", "FloatMode", False, "8.0")]
JOBS += [("forward", "BfloatMode", False, capability) for capability in CAPABILITIES]
JOBS += [(kernel, "BfloatMode", True, "8.0") for kernel in ("backward", "forward")]
JOBS += [(kernel, "BfloatMode", False, capability) for kernel in setup.HALF_KERNELS for capability in CAPABILITIES]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[cuda_resources.Kernel]:
    """The kernels of ``JOBS``."""
    nvcc = setup.installed_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    if not TEST_ALL:
        pytest.skip("takes minutes; NATTEN_EXT_TEST_ALL=1 runs it")
    folder = tmp_path_factory.mktemp("cuda")

    def compile_one(job: tuple[str, str, bool, str]) -> str:
        kernel, mode, general, capability = job
        flags = [*setup.cuda_flags(), *setup.kernel_macros(mode, general), *setup.architecture_flags(capability)]
        source, to = setup.CUDA_SOURCE / f"{kernel}.cu", folder / f"{kernel}{mode}{general}{capability}.o"
        command = [nvcc, *flags, "-c", str(source), "-o", str(to)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        reports = list(pool.map(compile_one, JOBS))
    return [kernel for report in reports for kernel in cuda_resources.parse(report.splitlines())]


def test_every_kernel_is_reported(kernels):
    names = {(kernel.name, kernel.capability) for kernel in kernels if kernel.dtype == "bfloat16"}
    expected = ("Forward", "BackwardQuery", "BackwardKey", "DoubleBackwardQuery", "DoubleBackwardKey")
    narrow = [f"Narrow{kernel.title().replace('_', '')}" for kernel in setup.NARROW_KERNELS]
    grid = [f"Grid{kernel.title().replace('_', '')}" for kernel in setup.GRID_KERNELS]
    short = [f"Short{kernel.title().replace('_', '')}" for kernel in setup.SHORT_KERNELS]
    expected += (*narrow, *(f"{name}Whole" for name in narrow), *grid, *short)
    general = {(f"General{name}", "8.0") for name in ("Forward", "BackwardQuery", "BackwardKey")}
    assert names == general | {(name, capability) for name in expected for capability in CAPABILITIES}
    assert {kernel.dtype for kernel in kernels} == {"bfloat16", "float32 (tf32)", "float32"}
    assert {kernel.head_dim for kernel in kernels} == {8, 16, 32, 64, 72, 80, 96, 128, 256}


def test_nothing_spills(kernels):
    """But for what three blocks on a multiprocessor cost the double backward of narrow heads, and on newer GPUs that of
    narrow windows of 16 channels; several there the derivatives of short sequences; grids' double backward its widest
    heads; mean keys the backward of narrow windows and grids; rounding to TF32 the double backward of wide heads, and
    splitting float32 the backward of one width."""
    spilling = [kernel for kernel in kernels if kernel.spills or kernel.stack]
    assert all(
        (kernel.name.startswith("DoubleBackward") and kernel.head_dim == 8)
        or (kernel.name == "DoubleBackwardQuery" and kernel.dtype == "float32 (tf32)" and kernel.stack <= 16)
        or (kernel.name == "BackwardQuery" and kernel.dtype == "float32" and kernel.stack <= 24)
        or (kernel.name == "BackwardQuery" and kernel.head_dim == 32 and kernel.stack <= 8)
        or (kernel.name.startswith("GridDouble") and kernel.head_dim == 96 and kernel.stack <= 48)
        or ((kernel.name, kernel.head_dim, kernel.capability) == ("NarrowDoubleBackwardQuery", 16, "10.0"))
        or (kernel.name.startswith("NarrowBackwardQuery") and (kernel.head_dim == 32 or kernel.capability == "10.0"))
        or (kernel.name == "GridBackward" and kernel.head_dim == 16 and kernel.stack <= 32)
        or (kernel.name.startswith("Short") and kernel.capability == "10.0" and kernel.stack <= 8)
        for kernel in spilling
    )
    assert all(kernel.stack <= 64 for kernel in spilling)


REPORT = """\
ptxas info    : Compiling entry function '_ZN10natten_ext4cuda16attention_kernelINS0_4ModeINS0_6BfloatEfLi1EEENS0_7ForwardELi32ELb0EEEvNS0_8ParamsOfIXT2_EEE' for 'sm_90'
ptxas info    : Function properties for _ZN10natten_ext4cuda16attention_kernelINS0_4ModeINS0_6BfloatEfLi1EEENS0_7ForwardELi32ELb0EEEvNS0_8ParamsOfIXT2_EEE
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size
"""  # noqa: E501
NARROW_REPORT = """\
ptxas info    : Compiling entry function '_ZN10natten_ext4cuda13narrow_kernelINS0_13NarrowForwardINS0_4ModeINS0_6BfloatEfLi1EEELi32ELb1EEEEEvNS0_12NarrowParamsE' for 'sm_90'
ptxas info    : Function properties for _ZN10natten_ext4cuda13narrow_kernelINS0_13NarrowForwardINS0_4ModeINS0_6BfloatEfLi1EEELi32ELb1EEEEEvNS0_12NarrowParamsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 105 registers, used 1 barriers
"""  # noqa: E501


def test_a_report_is_understood(tmp_path, capsys):
    kernel = cuda_resources.Kernel("Forward", "bfloat16", 32, "9.0", 168, 16, 20)
    assert list(cuda_resources.parse(REPORT.splitlines())) == [kernel]
    assert kernel.blocks == 3
    narrow = cuda_resources.Kernel("NarrowForwardWhole", "bfloat16", 32, "9.0", 105, 0, 0)
    assert list(cuda_resources.parse(NARROW_REPORT.splitlines())) == [narrow]
    assert narrow.blocks == 2
    grid = "NS0_11GridForwardINS0_4ModeINS0_6BfloatEfLi1EEELi16EEE"
    (kernel,) = cuda_resources.parse(
        [re.sub(r"NS0_13Narrow\w*EEE(?=EEv)", grid, x) for x in NARROW_REPORT.splitlines()]
    )
    assert (kernel.name, kernel.head_dim, kernel.blocks) == ("GridForward", 16, 4)
    path = tmp_path / "report.txt"
    path.write_text(REPORT)
    assert cuda_resources.main([str(path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    cells = ["Forward", "bfloat16", "32", "9.0", "168", "16", "20", "3", "19%", "75"]
    assert line.split() == cells
    assert cuda_resources.main([str(path), "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split(",") == cells


def test_a_missing_report_is_an_error(tmp_path, capsys):
    assert cuda_resources.main([str(tmp_path / "none")]) == 1
    assert "without CUDA kernels" in capsys.readouterr().err


def test_architecture_lists():
    assert setup.architecture_flags("8.0;9.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    with pytest.raises(SystemExit, match=r"'7.5' is not one of 8.0"):
        setup.architecture_flags("7.5 8.0")
    with pytest.raises(SystemExit, match="no compute capability"):
        setup.architecture_flags(" ")


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [([(9, 0), (8, 0), (9, 0)], "8.0;9.0"), ([(7, 5)], "8.0;9.0+PTX"), ([(99, 0), (8, 0)], "8.0;9.0+PTX")],
)
def test_capabilities_are_those_of_the_gpus(monkeypatch, gpus, expected):
    """An old GPU beside or instead of others is no error, and a GPU of the future gets PTX. This nvcc is an old one."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    listed = SimpleNamespace(stdout="sm_80\nsm_86\nsm_90\n")
    monkeypatch.setattr(setup.subprocess, "run", lambda command, **_: listed if command[0] == "nvcc" else None)
    assert setup.capabilities(torch, "nvcc") == expected
    assert setup.architecture_flags(expected)


def test_the_library_asks_for_all_of_torch(tmp_path, monkeypatch):
    """Linked by a torch without CUDA too: libtorch.so is what finds CUDA's symbols where the library is loaded."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    file = setup.NinjaFile("c++")
    setup.add_cuda_library(file, "nvcc", tmp_path, tmp_path, torch)
    link = next(i for i, line in enumerate(file.lines) if ": link_cuda " in line)
    flags = file.lines[link + 1].split()
    assert flags.index("-Xlinker=--no-as-needed") < flags.index("-ltorch")


@pytest.mark.parametrize(("gpu", "warned"), [((8, 6), False), ((9, 0), False), ((12, 0), True)])
def test_a_gpu_that_the_library_has_no_code_for(monkeypatch, gpu, warned):
    monkeypatch.setattr(cuda, "capability_of", lambda device: gpu)
    monkeypatch.setattr(cuda._compiled, "capabilities", lambda: "80:90", raising=False)
    with pytest.warns(RuntimeWarning, match="none for 12.0: the driver") if warned else nullcontext():
        cuda._warn_of_ptx.__wrapped__(0)


def test_leaving_the_kernels_out_and_asking_for_them(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NATTEN_EXT_CUDA", "0")
    with_cuda, without = (SimpleNamespace(version=SimpleNamespace(cuda=number)) for number in ("13.0", None))
    assert setup.find_nvcc(with_cuda) is None and "NATTEN_EXT_CUDA=0" in capsys.readouterr().out
    monkeypatch.setattr(setup.shutil, "which", lambda name: name)
    monkeypatch.delenv("NATTEN_EXT_CUDA")
    assert setup.find_nvcc(with_cuda) is not None and capsys.readouterr().out == ""
    assert setup.find_nvcc(without) is None and "this torch has no CUDA" in capsys.readouterr().out
    monkeypatch.setenv("NATTEN_EXT_CUDA", "1")
    assert setup.find_nvcc(without) is not None
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="there is no nvcc"):
        setup.find_nvcc(without)
    monkeypatch.delenv("NATTEN_EXT_CUDA")
    assert setup.find_nvcc(with_cuda) is None and len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.setenv("NATTEN_EXT_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1, got 'yes'"):
        setup.find_nvcc(with_cuda)
