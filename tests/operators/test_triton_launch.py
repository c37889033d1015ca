"""The launch of Triton's kernels, as far as it goes without a GPU: see pretend_driver.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.operators.interpreter import environment_without_interpreter

pytest.importorskip("triton")

KERNELS = (
    "backward_key_kernel", "backward_query_kernel", "double_key_kernel", "double_query_kernel", "forward_kernel",
    "padded_table_kernel", "row_terms_kernel", "table_parts_kernel", "table_shares_kernel", "table_sum_kernel",
)  # fmt: skip


@pytest.mark.slow
def test_every_kernel_gets_the_parameters_it_was_compiled_for():
    done = subprocess.run(
        [sys.executable, "-m", "tests.operators.pretend_driver"],
        cwd=Path(__file__).parents[2],
        env=environment_without_interpreter(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    count, *kernels = done.stdout.split()
    assert tuple(kernels) == KERNELS and int(count) >= 3 * (1 + 2 + 2 + 2)
