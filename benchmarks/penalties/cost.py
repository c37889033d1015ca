"""What a discriminator's update with R1 and R2 costs: exact with fused and with naive attention, and estimated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import natten_ext
from benchmarks.timing import CpuClock, time_in_turns
from gans.common.distributed import World
from gans.losses.adversarial import LossConfig
from gans.recipes.config import TrainConfig
from gans.recipes.named import preset
from gans.training.profile import measure_apart
from gans.training.steps import discriminator_step, make_networks

PATCHES = {64: 4, 256: 2, 1024: 1, 4096: 1}
"""Tokens of a discriminator, besides its class token, and the side of their patches."""
NAIVE = "reference"


class ProcessorClock(CpuClock):
    """Processor time per call, all threads together: on a machine with other jobs it scatters less than wall time."""

    def sample(self, call: Callable[[], object], calls: int) -> float:
        start = time.process_time()
        for _ in range(calls):
            call()
        return (time.process_time() - start) / calls


@dataclass(frozen=True)
class Way:
    """How the penalties are taken. ``mode`` None is without any."""

    mode: str | None
    backend: str

    @property
    def name(self) -> str:
        return f"{self.mode or 'none'}, {'naive' if self.backend == NAIVE else 'fused'}"


WAYS = tuple(
    Way(mode, backend)
    for mode, backend in (
        (None, "auto"), ("exact", "auto"), ("finite-difference", "auto"), ("jvp", "auto"),
        ("exact", NAIVE), ("finite-difference", NAIVE),
    )
)  # fmt: skip


def recipe(tokens: int, mode: str | None, batch: int) -> TrainConfig:
    """``vitgan32-small`` with smaller patches in the discriminator, and 64 px beyond 1024 tokens; relativistic loss, R1
    and R2 in every update.
    """
    small = preset("vitgan32-small")
    size = 64 if tokens > 1024 else 32
    gamma = 0.0 if mode is None else 0.1
    return replace(
        small,
        generator=replace(small.generator, image_size=size),
        discriminator=replace(small.discriminator, image_size=size, patch_size=PATCHES[tokens]),
        loss=LossConfig("relativistic", gp_weight=0, drift=0, r1=gamma, r2=gamma, penalty_mode=mode or "exact"),
        batch_d=batch,
        batch_g=batch,
    )


def measure(tokens: int, batch: int, repeats: int, threads: int) -> list[dict[str, object]]:
    """Median processor times of updates taken in turns in this process, and peak memory in a process each."""
    device = torch.device("cpu")
    world = World(device)

    def update(way: Way) -> Callable[[], object]:
        config = recipe(tokens, way.mode, batch)
        networks = make_networks(config, device)
        size = config.discriminator.image_size
        real = torch.rand(batch, 3, size, size, device=device) * 2 - 1

        def call() -> None:
            with natten_ext.use_backend(way.backend):
                discriminator_step(0, 0, config, networks, real, world)

        return call

    times = time_in_turns({way.name: update(way) for way in WAYS}, ProcessorClock(), repeats, budget=60.0)
    found = []
    for way in WAYS:
        timing = times[way.name]
        config = recipe(tokens, way.mode, batch)
        cost = measure_apart(
            config, backend=way.backend, device="cpu", update="discriminator", threads=threads, repeats=1
        )
        attention = "naive" if way.backend == NAIVE else "fused"
        entry = {"tokens": tokens, "batch": batch, "mode": way.mode, "attention": attention, "backend": cost.backend}
        entry |= {"seconds": timing.median, "spread": timing.spread, "samples": len(timing.samples)}
        found.append(entry | {"peak_mib": cost.peak_mib})
    return found
