"""Memory grows with the tokens, never with tokens times keys: the peak of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
import torch, natten_ext
backend, kind, tokens, order = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(2)

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def attend(q, k, v):
    if kind == "full":
        return natten_ext.attention(q, k, v, backend=backend)
    if kind == "l2":
        return natten_ext.l2_attention(q, k, v, backend=backend)
    if kind == "line":
        return natten_ext.neighborhood_attention(q, k, v, 255, backend=backend)
    q, k, v = (x.unflatten(1, (-1, 64)) for x in (q, k, v))
    height = q.shape[1]
    if kind == "grid":
        bias = torch.zeros(1, 2 * height - 1, 127, requires_grad=True)
        return natten_ext.grid_attention(q, k, v, (height, 64), bias=bias, backend=backend).flatten(1, 2)
    return natten_ext.neighborhood_attention(q, k, v, 15, bias=torch.zeros(1, 29, 29, requires_grad=True),
                                             backend=backend).flatten(1, 2)

def step(tokens):
    q, k, v = (torch.randn(1, tokens, 1, 32, requires_grad=order != "forward") for _ in range(3))
    output = attend(q, k, v)
    if order != "forward":
        first = torch.autograd.grad(output.square().sum(), (q, k, v), create_graph=order == "double")
    if order == "double":
        torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))

step(1024)  # code, pools and thread stacks
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM starts again from here
before = status("VmRSS")
step(tokens)
print(json.dumps(status("VmHWM") - before))
"""

MIB = 2**20


def peak(backend: str, kind: str, tokens: int, order: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, backend, kind, str(tokens), order],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"MALLOC_ARENA_MAX": "2"},
    )
    if "clear_refs" in done.stderr:
        pytest.skip("the kernel does not let a process reset its peak memory")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "order"), [("full", "forward"), ("l2", "double"), ("grid", "double"), ("na", "double"), ("line", "double")]
)
def test_peak_memory_is_linear_in_tokens(target, kind, order):
    """4096 tokens of 32 channels are half a MiB a tensor; their scores would be 64 MiB, a gathered kernel 115."""
    if target.device != "cpu" or target.slow:
        pytest.skip("measures the memory of native kernels on the CPU")
    assert peak(target.backend, kind, 4096, order) < 24 * MIB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_measurement_sees_a_score_matrix():
    assert peak("reference", "full", 4096, "forward") > 60 * MIB
