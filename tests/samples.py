"""Which of a test's parameters run, so that all tests end within minutes.

A test of an operator has up to hundreds of parameters. Of those for one backend it gets a few, evenly spread: as many
as `SAMPLES` says, or as `pytest.mark.samples(native=..., emulated=..., interpreted=...)` does. An interpreter takes
seconds for what takes an emulator milliseconds, so it gets none of the tests of what all backends share, as vmap.
Elsewhere than in tests/operators only tests with the marker are sampled. On a GPU, and with NATTEN_EXT_TEST_ALL=1, all
run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SAMPLES = {"native": 40, "emulated": 8, "interpreted": 1}
TEST_ALL = os.environ.get("NATTEN_EXT_TEST_ALL") == "1"

_TESTS = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if TEST_ALL:
        return
    groups: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("samples") or _TESTS / "operators" in item.path.parents:
            groups.setdefault((item.nodeid.partition("[")[0], str(_target(item))), []).append(item)
    dropped: set[pytest.Item] = set()
    for group in groups.values():
        count = _count(group[0])
        if count < len(group):
            kept = {(2 * index + 1) * len(group) // (2 * count) for index in range(count)}
            dropped |= {item for index, item in enumerate(group) if index not in kept}
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


def _target(item: pytest.Item) -> object:
    """What has a `speed` among a test's parameters, if it has any."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return next((value for value in parameters if hasattr(value, "speed")), None)


def _count(item: pytest.Item) -> float:
    of_directory = "emulated" if _TESTS / "cuda" in item.path.parents else "native"
    marker = item.get_closest_marker("samples")
    counts = SAMPLES | marker.kwargs if marker else SAMPLES
    return counts.get(getattr(_target(item), "speed", of_directory), float("inf"))
