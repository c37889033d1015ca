"""What several tests of the emulated kernels share."""

import pytest

from tests.cuda import emulated


@pytest.fixture
def h100():
    """As much shared memory as an H100 gives a block."""
    with emulated.settings(shared_limit=emulated.H100_SHARED):
        yield
