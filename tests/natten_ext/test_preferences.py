"""The table of measured preferences among the GPU backends."""

from __future__ import annotations

import json

import pytest

from natten_ext.backends import preferences

GRID = {"capability": "9.0", "neighborhood": "grid", "dtype": "bfloat16", "results": "x.json"}


@pytest.fixture
def table(tmp_path):
    def write(*entries):
        path = tmp_path / "preferences.json"
        path.write_text(json.dumps({"measured": [GRID | entry for entry in entries]}))
        return str(path)

    return write


def test_the_narrowest_class_that_holds_the_heads(table):
    path = table({"head_dim": 128, "fastest": ["triton", "cuda"]}, {"head_dim": 32, "fastest": ["cuda", "triton"]})
    for head_dim, first in ((1, "cuda"), (32, "cuda"), (33, "triton"), (128, "triton"), (129, "cuda")):
        assert preferences.order("9.0", "grid", "bfloat16", head_dim, path)[0] == first
    for other in (("8.0", "grid", "bfloat16"), ("9.0", "full", "bfloat16"), ("9.0", "grid", "float32")):
        assert preferences.order(*other, 64, path) == preferences.DEFAULT_ORDER


def test_an_entry_orders_all_gpu_backends(table):
    with pytest.raises(ValueError, match="fastest must order"):
        preferences.read(table({"head_dim": 64, "fastest": ["cuda"]}))


def test_the_package_has_a_table_that_reads():
    for entry in preferences.read():
        assert entry.results.startswith("benchmarks/results/")
