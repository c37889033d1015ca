"""What all tests share: the import path of the helpers, one thread, repeatable random numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent

# With tests/ on the path, the folder tests/natten_ext could pass for a namespace package of the name under test.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.insert(0, str(HERE / "natten_ext"))

if not torch.cuda.is_available():
    import interpreter  # of Triton's kernels; before anything imports Triton

    interpreter.use()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds (compilers, subprocesses)")
    # Threads that spin at barriers make small operators a hundred times slower on a busy machine. Tests of threading
    # ask for theirs, see the fixture `threads`.
    torch.set_num_threads(1)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
