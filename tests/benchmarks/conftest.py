"""What the tests of the benchmarks share."""

import pytest


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """Triton's interpreter is there for the operators' tests; nobody times it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
