"""Which backends and devices the operator tests run on.

A test that asks for `target` runs once per fused backend and device that `natten_ext.backends` calls available, one
that asks for `any_target` also on `reference`; a backend that joins the package joins the tests with no code here. A
test that also asks for `case` gets its cases from the marker `pytest.mark.cases(...)`: all of them where kernels run
at full speed, the small ones where they are interpreted or emulated.

Of its parameters it gets a few where kernels do not run at full speed, see `tests/samples.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

import natten_ext
from natten_ext.backends.choice import TAKES
from tests.operators.cases import Case
from tests.samples import TEST_ALL

# Backends whose kernels are not made for the CPU run there through an interpreter or an emulator.
NATIVE_ON_CPU = {"reference", "cpu", "matmul"}
INTERPRETED_ON_CPU = {"triton"}


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

    @property
    def speed(self) -> str:
        """A name of `tests.samples.SAMPLES`."""
        if not self.slow:
            return "native" if self.device == "cpu" else "gpu"
        return "interpreted" if self.interpreted else "emulated"

    def takes(self, case: Case) -> bool:
        """Whether a case is small enough for this target."""
        if self.interpreted and not TEST_ALL:
            return case.small and case.lattices <= 6
        return case.kind in TAKES[self.backend] and (case.small or not self.slow)

    def status(self, dtype: torch.dtype, head_dim: int) -> natten_ext.BackendStatus:
        statuses = natten_ext.list_backends(self.device, dtype, head_dim, TAKES[self.backend][0])
        return next(status for status in statuses if status.name == self.backend)

    def can(self, dtype: torch.dtype, head_dim: int = 8) -> bool:
        return self.status(dtype, head_dim).available

    def skip_unless_can(self, dtype: torch.dtype, head_dim: int = 8) -> None:
        if reason := self.status(dtype, head_dim).reason:
            pytest.skip(f"{self}: {reason}")


def targets(with_reference: bool, kind: str = "neighborhood") -> list[Target]:
    """All targets for a kind, or those named in NATTEN_EXT_TEST_BACKENDS and NATTEN_EXT_TEST_DEVICES (separated by
    commas)."""
    wanted = [name for name in os.environ.get("NATTEN_EXT_TEST_BACKENDS", "").split(",") if name]
    devices = [name for name in os.environ.get("NATTEN_EXT_TEST_DEVICES", "").split(",") if name]
    devices = devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    return [
        Target(status.name, device)
        for device in devices
        for status in natten_ext.list_backends(device, torch.float32, 8, kind)
        if status.available and (with_reference or status.name != "reference") and (not wanted or status.name in wanted)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = next((n for n in ("target", "any_target") if n in metafunc.fixturenames), None)
    chosen = targets(with_reference=name == "any_target") if name else []
    marker = metafunc.definition.get_closest_marker("cases")
    cases: list[Case] = list(marker.args[0]) if marker else []
    if name and "case" in metafunc.fixturenames:
        # Those that do not take every kind have tests with cases only.
        chosen += [t for t in targets(name == "any_target", "full") if t not in chosen]
        pairs = [(target, case) for target in chosen for case in cases if target.takes(case)]
        metafunc.parametrize((name, "case"), pairs, ids=lambda value: str(value))
    elif name:
        metafunc.parametrize(name, chosen, ids=str)
    elif marker:
        metafunc.parametrize("case", cases, ids=str)
