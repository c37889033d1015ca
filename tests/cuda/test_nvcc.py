"""nvcc takes all CUDA sources, as far as PTX: it refuses some of what compilers for the host take."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import setup
from tests.samples import TEST_ALL

NVCC = setup.installed_nvcc()
# As quick as can be, and no further than PTX: less than a tenth of the time.
FLAGS = ["-std=c++20", "-arch=compute_90", "-Ofc=max", "-ptx"]
# Modes that take different ways: one product on the tensor cores, three of them, and multiply-adds. The first with
# general neighborhoods, which kernels of half precision alone do not have.
KERNELS = [
    (kernel, mode, general)
    for _, kernel, mode, general in setup.CUDA_OBJECTS
    if TEST_ALL
    or (mode, general)
    in {("BfloatMode", kernel not in setup.HALF_KERNELS), ("FloatMode", False), ("DoubleMode", False)}
]


@pytest.fixture
def complaints(tmp_path) -> Callable[..., str]:
    """What nvcc says of a source that it refuses with some more flags."""
    return partial(compile_to_ptx, tmp_path / "kernels.ptx")


def compile_to_ptx(to: Path, source: Path, *flags: str) -> str:
    if NVCC is None:
        pytest.skip("there is no nvcc")
    command = [NVCC, *FLAGS, *flags, str(source), "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Unknown option" in done.stderr:
        pytest.skip("this nvcc has no -Ofc")
    return done.stderr if done.returncode != 0 else ""


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "mode", "general"), KERNELS, ids=str)
def test_kernels(complaints, kernel, mode, general):
    assert complaints(setup.CUDA_SOURCE / f"{kernel}.cu", *setup.kernel_macros(mode, general)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("source", [setup.CUDA_SOURCE / "library.cpp", setup.EVERY_KERNEL_SOURCE], ids=lambda p: p.name)
def test_the_library_and_the_program_that_launch_them(complaints, source):
    macro = setup.capability_macro("8.0;9.0+PTX")
    assert complaints(source, "-x=cu", *setup.torch_flags(torch), "-DUSE_CUDA", macro) == ""


def test_every_source_is_compiled():
    assert {kernel for kernel, _, _ in KERNELS} == {path.stem for path in setup.CUDA_SOURCE.glob("*.cu")}


def test_a_mistake_is_found(complaints, tmp_path):
    """That compilers for the host do not see: what only the host can call."""
    source = tmp_path / "mistake.cu"
    source.write_text("int on_the_host() { return 1; }\n__global__ void kernel(int* x) { *x = on_the_host(); }\n")
    assert "on_the_host" in complaints(source)
