"""``python -m benchmarks.host_time``: its table, and that a call does no more in Python than it needs."""

from __future__ import annotations

import pytest

from tests.operators.interpreter import python_without_interpreter

pytest.importorskip("triton")

MOST_CALLS = {"triton": 72, "cuda": 66}
"""Of Python functions in a forward with gradients: what depends on no clock."""

CODE = """
import sys
from contextlib import ExitStack
from benchmarks import host_time
from benchmarks.kernels import pretended
host_time.main(["--rounds", "1"])
for backend, pretend in {"triton": pretended.gpu, "cuda": host_time.pretended_cuda}.items():
    with pretend():
        forward = host_time.calls_of(backend, False)["forward"]
        forward()
        calls = []
        sys.setprofile(lambda frame, event, argument: calls.append(frame) if event == "call" else None)
        forward()
        sys.setprofile(None)
        print(backend, len(calls))
"""


@pytest.mark.slow
def test_the_table_and_how_much_python_a_call_runs():
    done = python_without_interpreter("-c", CODE)
    assert done.returncode == 0, done.stderr
    *table, triton, cuda = done.stdout.splitlines()
    cells = [line.strip("| ").split(" | ") for line in table]
    assert cells[0][:3] == ["backend", "problem", "call"] and len(cells) == 2 + 1 + 2 * 2 * 4
    assert {row[0] for row in cells[3:]} == {"triton", "cuda"} and all(
        int(row[3]) >= int(row[4]) > 0 for row in cells[3:]
    )
    for line in (triton, cuda):
        backend, calls = line.split()
        assert int(calls) <= MOST_CALLS[backend]
