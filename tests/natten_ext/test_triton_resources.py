"""Kernels of the triton backend compiled ahead of time: no spilled registers, no more shared memory than there is.

Compiling every variant of every named shape takes hours (``python -m natten_ext.triton.resources`` does it). Here are
all kernels for the neighborhood with a table and for heads of 72 channels with a table, and some for `l2` and float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

# (architecture, shapes, dtypes, orders)
COMPILED = [
    ("sm_90", ["nat-256"], ["bfloat16"], ["forward", "backward", "double"]),
    ("sm_80", ["church-d1"], ["bfloat16"], ["forward", "backward", "double"]),
    ("sm_100", ["l2-1k"], ["bfloat16"], ["forward", "backward"]),
    ("sm_80", ["nat-256"], ["float32"], ["forward", "backward"]),
]


def resources(*arguments: str) -> subprocess.CompletedProcess:
    """The command, in a process that does not interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "natten_ext.triton.resources", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "shapes", "dtypes", "orders"), COMPILED, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_kernels_fit_the_architecture(tmp_path, arch, shapes, dtypes, orders):
    table = tmp_path / "usage.json"
    done = resources(
        "--arch", arch, "--shapes", *shapes, "--dtypes", *dtypes, "--orders", *orders,
        "--processes", "2", "--json", str(table),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    usages = json.loads(table.read_text())
    assert {usage["arch"] for usage in usages} == {arch}
    kernels = {usage["kernel"] for usage in usages}
    assert {"forward", "backward_query", "backward_key"} <= kernels
    assert ("double" not in orders) or {"double_query", "double_key"} <= kernels
    for usage in usages:
        assert usage["spilled"] == 0 and 0 < usage["registers"] <= 255 and usage["seconds"] > 0


@pytest.mark.slow
def test_a_spill_is_seen(tmp_path):
    """A tile that is far too large: the command says so and fails."""
    code = (
        "import sys; from natten_ext.triton import configs, resources\n"
        "with configs.forced(configs.Config(64, 64, 4, 1)):\n"
        "    sys.exit(resources.main(['--arch', 'sm_80', '--shapes', 'church-g4', '--dtypes', 'bfloat16',\n"
        "                             '--orders', 'backward', '--kernels', 'backward_key']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "FAILS: spills" in done.stdout, done.stdout + done.stderr
