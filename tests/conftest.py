"""What all tests share: one thread, repeatable random numbers, broken GPU contexts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.samples import pytest_collection_modifyitems  # noqa: F401

if not torch.cuda.is_available():
    from tests.cuda import emulator  # of CUDA's kernels; before anything asks which backends there are
    from tests.operators import interpreter  # of Triton's kernels; before anything imports Triton

    interpreter.use()
    emulator.use()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds (compilers, subprocesses)")
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "cases(cases): the attention problems that a test runs on")
    config.addinivalue_line("markers", "samples(native, emulated, interpreted): how many of its parameters a test gets")
    # Threads that spin at barriers make small operators a hundred times slower on a busy machine. Tests of threading
    # ask for theirs, see the fixture `threads`.
    torch.set_num_threads(1)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def tf32() -> Iterator[None]:
    """torch lets float32 matrix products be computed in TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End a worker of pytest-xdist whose CUDA context is broken, once the test is reported: xdist starts another.

    After an illegal access every later call fails, and would be reported as another test's failure.
    """
    result = yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result
