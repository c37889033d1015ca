"""The launch of Triton's kernels, as far as it goes without a GPU: see pretend_driver.py."""

from __future__ import annotations

import pytest

from tests.operators.interpreter import python_without_interpreter

pytest.importorskip("triton")

KERNELS = (
    "backward_key_kernel", "backward_query_kernel", "double_key_kernel", "double_query_kernel", "forward_kernel",
    "padded_table_kernel", "row_terms_kernel", "table_parts_kernel", "table_shares_kernel", "table_sum_kernel",
)  # fmt: skip


@pytest.mark.slow
def test_every_kernel_gets_the_parameters_it_was_compiled_for():
    done = python_without_interpreter("-m", "tests.operators.pretend_driver")
    assert done.returncode == 0, done.stderr
    count, *kernels = done.stdout.split()
    assert tuple(kernels) == KERNELS and int(count) >= 3 * (1 + 2 + 2 + 2)
