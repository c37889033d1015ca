"""The benchmarks are not installed: they are imported from the tree."""

import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """Triton's interpreter is there for the operators' tests; nobody times it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
