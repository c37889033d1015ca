"""The emulator's settings, and problems run under them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import natten_ext
from tests.operators.cases import Case, Inputs, cotangents_of, derivatives, forward, grad_output_of, inputs_of

NEEDED = pytest.mark.skipif(
    not any(status.name == "cuda" and status.available for status in natten_ext.list_backends()),
    reason="the cuda backend is not emulated here",
)
SHARED_LIMIT = 99 * 1024
H100_SHARED = 227 * 1024  # bytes of shared memory that an H100 gives a block
TABLE_BLOCKS = 2048


@contextmanager
def settings(
    order: int = 0, dropped_site: str = "", shared_limit: int = SHARED_LIMIT, table_blocks: int = TABLE_BLOCKS
) -> Iterator[None]:
    """Emulate a GPU: the order of a block's warps, a barrier left out, shared memory per block, table blocks."""
    configure = torch.ops.natten_ext_cuda.configure
    configure(order, dropped_site, shared_limit, table_blocks)
    try:
        yield
    finally:
        configure(0, "", SHARED_LIMIT, TABLE_BLOCKS)


def solve(case: Case, dtype: torch.dtype) -> Inputs:
    """All three orders of a case on the emulated GPU."""
    inputs = inputs_of(case, dtype)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    return derivatives(lambda leaves: forward(case, leaves, "cuda"), inputs, grad_output, cotangents)
