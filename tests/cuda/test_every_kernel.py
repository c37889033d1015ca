"""The program that compute-sanitizer watches (benchmarks/gpu/every_kernel.cpp), with emulated kernels."""

from __future__ import annotations

import subprocess

import pytest

from tests.cuda import emulator
from tests.samples import TEST_ALL

MODES = ("bfloat16", "float16", "tf32", "float32", "float64") if TEST_ALL else ("bfloat16",)

pytestmark = pytest.mark.skipif(not emulator.EVERY_KERNEL.exists(), reason="the cuda backend is not emulated here")


@pytest.mark.parametrize("mode", MODES)
def test_every_kernel_is_right(mode):
    done = subprocess.run([emulator.EVERY_KERNEL, mode], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.endswith(f"{mode}: right")] == [] and done.returncode == 0, done.stderr
    assert len(lines) == (41 if mode.endswith("float16") else 14)


def test_a_mode_that_does_not_exist_is_named():
    done = subprocess.run([emulator.EVERY_KERNEL, "half"], capture_output=True, text=True, check=False)
    assert done.returncode == 100 and "got half" in done.stderr
