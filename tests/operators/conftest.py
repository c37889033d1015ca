"""Which backends and devices the operator tests run on.

A test that asks for `target` runs once per fused backend and device that `natten_ext.backends` calls available, one
that asks for `any_target` also on `reference`; a backend that joins the package joins the tests with no code here. A
test that also asks for `case` gets its cases from the marker `pytest.mark.cases(...)`: all of them where kernels run
at full speed, the small ones where they are interpreted or emulated.

An interpreter takes seconds for what takes an emulator milliseconds. Of each test it gets a few, evenly spread over
its parameters: 1, or as many as `pytest.mark.interpreted(...)` says; an emulator gets 24 of them at most. Both get all
with NATTEN_EXT_TEST_ALL=1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

import natten_ext
from tests.operators.cases import Case

# Backends whose kernels are not made for the CPU run there through an interpreter or an emulator.
NATIVE_ON_CPU = {"reference", "cpu"}
INTERPRETED_ON_CPU = {"triton"}
EMULATED = 24
TEST_ALL = os.environ.get("NATTEN_EXT_TEST_ALL") == "1"


@dataclass(frozen=True)
class Target:
    """A backend on a device."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-on-{self.device}"

    @property
    def slow(self) -> bool:
        """Whether only small cases should run."""
        return self.device == "cpu" and self.backend not in NATIVE_ON_CPU

    @property
    def interpreted(self) -> bool:
        return self.device == "cpu" and self.backend in INTERPRETED_ON_CPU

    def takes(self, case: Case) -> bool:
        """Whether a case is small enough for this target."""
        if self.interpreted and not TEST_ALL:
            return case.small and case.lattices <= 6
        return case.small or not self.slow

    def can(self, dtype: torch.dtype, head_dim: int = 8) -> bool:
        return any(
            s.available and s.name == self.backend for s in natten_ext.list_backends(self.device, dtype, head_dim)
        )

    def skip_unless_can(self, dtype: torch.dtype, head_dim: int = 8) -> None:
        for status in natten_ext.list_backends(self.device, dtype, head_dim):
            if status.name == self.backend and not status.available:
                pytest.skip(f"{self}: {status.reason}")


def targets(with_reference: bool) -> list[Target]:
    """All targets, or those named in NATTEN_EXT_TEST_BACKENDS and NATTEN_EXT_TEST_DEVICES (separated by commas)."""
    wanted = [name for name in os.environ.get("NATTEN_EXT_TEST_BACKENDS", "").split(",") if name]
    devices = [name for name in os.environ.get("NATTEN_EXT_TEST_DEVICES", "").split(",") if name]
    devices = devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    return [
        Target(status.name, device)
        for device in devices
        for status in natten_ext.list_backends(device, torch.float32, 8)
        if status.available and (with_reference or status.name != "reference") and (not wanted or status.name in wanted)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = next((n for n in ("target", "any_target") if n in metafunc.fixturenames), None)
    chosen = targets(with_reference=name == "any_target") if name else []
    marker = metafunc.definition.get_closest_marker("cases")
    cases: list[Case] = list(marker.args[0]) if marker else []
    if name and "case" in metafunc.fixturenames:
        pairs = [(target, case) for target in chosen for case in cases if target.takes(case)]
        metafunc.parametrize((name, "case"), pairs, ids=lambda value: str(value))
    elif name:
        metafunc.parametrize(name, chosen, ids=str)
    elif marker:
        metafunc.parametrize("case", cases, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave interpreters and emulators a few of each test."""
    if TEST_ALL:
        return
    groups: dict[tuple[str, Target], list[pytest.Item]] = {}
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params.values()
        for target in [value for value in parameters or () if isinstance(value, Target) and value.slow]:
            groups.setdefault((item.nodeid.partition("[")[0], target), []).append(item)
    dropped: set[pytest.Item] = set()
    for (_, target), group in groups.items():
        marker = group[0].get_closest_marker("interpreted")
        count = EMULATED if not target.interpreted else marker.args[0] if marker else 1
        if count < len(group):
            kept = {(2 * index + 1) * len(group) // (2 * count) for index in range(count)}
            dropped |= {item for index, item in enumerate(group) if index not in kept}
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]
