"""Instructions in the loops of Triton's kernels: no sampled kernel has grown by more than 5 percent.

``python -m benchmarks.kernels.triton_instructions --update`` makes the table that they are held against.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.operators.interpreter import python_without_interpreter

pytest.importorskip("triton")

from benchmarks.kernels import triton_instructions as instructions

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_no_sampled_kernel_has_grown():
    """Compiled here, in seconds: one of each kind of pass."""
    code = (
        "import json; from benchmarks.kernels.triton_instructions import counted\n"
        "counts = counted(['nat-256'], ['forward', 'backward_key', 'table_shares'])\n"
        "counts |= counted(['church-g5'], ['double_query'])\n"
        "print(json.dumps([[*kind, loops] for kind, loops in counts.items()]))"
    )
    done = python_without_interpreter("-c", code)
    assert done.returncode == 0, done.stderr
    counts = {(kernel, shape): loops for kernel, shape, loops in json.loads(done.stdout)}
    assert len(counts) == 5
    assert not instructions.grown(counts, instructions.read())


def test_growth_is_seen():
    before = {("forward", "nat-256"): "20.0", ("double_query", "nat-256"): "20.0 + 30.0"}
    assert not instructions.grown(before | {("forward", "nat-256"): "20.9"}, before)
    assert instructions.grown(before | {("forward", "nat-256"): "21.1"}, before) == ["forward of nat-256: 20.0 -> 21.1"]
    for loops in ("20.0 + 31.6", "20.0", "10.0 + 10.0 + 10.0"):
        assert len(instructions.grown(before | {("double_query", "nat-256"): loops}, before)) == 1


def test_the_docs_have_the_table():
    assert instructions.table(instructions.read()) in (ROOT / "docs" / "triton.md").read_text()


def test_loops():
    """Innermost loops with products: not the outer one, not one that waits, not the end of the code."""
    lines = [
        "MOV R1, R2", "MOV R3, R4", "HMMA.16816.F32.BF16 R4, R4, R8, R4", "@P0 BRA 0x10", "@P1 BRA 0x0",
        "NANOSLEEP 0x1", "@!P0 BRA 0x50", "BRA 0x70",
    ]  # fmt: skip
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    assert instructions.loops_of(sass) == [3]
