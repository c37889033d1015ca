"""The cpu backend's other instruction sets: a part of its tests in a process that is told which to use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import natten_ext
from natten_ext.backends import cpu

FOLDER = Path(__file__).resolve().parent
BUILT = any(status.name == "cpu" and status.available for status in natten_ext.list_backends())
FILES = [str(FOLDER / f"test_{name}.py") for name in ("accuracy", "conditioning", "extremes")]
ACCURACY = "all_orders and (full-dim or full-cross or 6x10 or 9x10 or per-head or 7x9)"
CHOSEN = f"cpu-on-cpu and ({ACCURACY} or every_half or conditioning or no_more or tables)"


def in_a_process(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"NATTEN_EXT_CPU_ISA": instruction_set, "NATTEN_EXT_TEST_BACKENDS": "cpu"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not BUILT, reason="the cpu backend is not built")
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_accuracy_with_each_instruction_set(instruction_set):
    if instruction_set not in cpu.build_information()["instruction_sets"].split():
        pytest.skip(f"not compiled for {instruction_set}")
    try_it = "import torch, natten_ext; q = torch.ones(1, 2, 1, 4); natten_ext.attention(q, q, q, backend='cpu')"
    tried = in_a_process(instruction_set, "-c", try_it)
    if "this machine has no" in tried.stderr:
        pytest.skip(tried.stderr.strip().splitlines()[-1])
    assert tried.returncode == 0, tried.stderr
    if instruction_set == "avx512" or (instruction_set == "avx2" and not torch.cpu._is_avx512_supported()):
        return  # what all other tests of this run use
    done = in_a_process(instruction_set, "-m", "pytest", "-q", "-x", "-k", CHOSEN, *FILES)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not BUILT, reason="the cpu backend is not built")
def test_an_unknown_instruction_set_is_an_error():
    code = "import torch, natten_ext; q = torch.ones(1, 2, 1, 4); natten_ext.attention(q, q, q, backend='cpu')"
    done = in_a_process("sse9", "-c", code)
    assert done.returncode != 0
    assert "NATTEN_EXT_CPU_ISA" in done.stderr and "sse9" in done.stderr
