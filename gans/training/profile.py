"""Time and peak memory of one training step: a discriminator update with its penalty, and a generator update.

Memory is what the step needs beyond weights, optimiser states and the images given to it. On the CPU that is
the resident peak of a process of its own, which has only been warmed up with two images before, minus what
was resident then; on a GPU it is the peak of torch's allocator.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor

import natten_ext
from gans.common.distributed import World, choose_device
from gans.recipes.config import TrainConfig, from_dict, to_dict
from gans.training.steps import discriminator_step, generator_step, make_networks

Update = Literal["both", "discriminator", "generator"]


@dataclass(frozen=True)
class StepCost:
    """What one training step costs with one choice of attention backend."""

    backend: str
    """What computed the step's attention; several names where calls took different ones."""
    seconds: float
    peak_mib: float


def _status_mib(field: str) -> float:
    """A field of /proc/self/status, such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak(device: torch.device) -> float:
    """Forgets the peak so far; returns the memory in use, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    # Not permitted everywhere. The peak is then the process's, which warming up kept below the step's.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status_mib("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _status_mib("VmHWM")


def measure(
    config: TrainConfig, *, backend: str, device: str = "auto", update: Update = "both", repeats: int = 3
) -> StepCost:
    """Measures a recipe's step in this process: median time of `repeats` steps, and the first's peak memory.

    `backend` is "auto" or one of natten_ext's names.
    """
    target = choose_device(device)
    networks = make_networks(config, target)
    world = World(target)
    dtype = next(networks.discriminator.parameters()).dtype

    def images(count: int) -> Tensor:
        size, channels = config.generator.image_size, config.generator.channels
        return torch.rand(count, channels, size, size, device=target, dtype=dtype) * 2 - 1

    def labels(count: int) -> Tensor | None:
        classes = config.classes
        return torch.randint(classes, (count,), device=target) if classes else None

    def step(config: TrainConfig) -> None:
        if update != "generator":
            real, own = images(config.batch_d), labels(config.batch_d)
            for what in config.updates:
                discriminator_step(0, 0, config, networks, real, world, what, own)
        if update != "discriminator":
            real, own = images(config.batch_g) if networks.loss.uses_real else None, labels(config.batch_g)
            for what in config.updates:
                generator_step(0, config, networks, real, world, what, own)
        if target.type == "cuda":
            torch.cuda.synchronize(target)

    with natten_ext.use_backend(backend):
        with natten_ext.record_calls() as calls:
            step(replace(config, batch_d=2, batch_g=2, accumulate=1))
        before = _reset_peak(target)
        step(config)
        peak = _peak(target) - before
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            step(config)
            times.append(time.perf_counter() - started)
    return StepCost(", ".join(sorted({call.backend for call in calls})), median(times), peak)


def measure_apart(
    config: TrainConfig,
    *,
    backend: str,
    device: str = "auto",
    update: Update = "both",
    threads: int = 0,
    repeats: int = 3,
    limit: float | None = None,
) -> StepCost:
    """`measure` in a fresh process.

    RuntimeError with its output if it fails, TimeoutError if it takes more than `limit` seconds.
    """
    options = {"backend": backend, "device": device, "update": update, "repeats": repeats}
    request = {"recipe": to_dict(config), "threads": threads, "options": options}
    command = [sys.executable, "-m", "gans.training.profile"]
    try:
        result = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"measuring backend {backend!r} took more than {limit:g} s") from None
    if result.returncode:
        raise RuntimeError(f"measuring backend {backend!r} failed:\n{result.stderr}")
    return StepCost(**json.loads(result.stdout.splitlines()[-1]))


def compare(
    config: TrainConfig, *, device: str = "auto", update: Update = "both", threads: int = 0, repeats: int = 3
) -> list[StepCost]:
    """A recipe's step with the backend that "auto" takes, and with naive attention, each in a fresh process.

    Raises ValueError for a device that torch cannot use, negative ``threads`` and no ``repeats``.
    """
    choose_device(device)
    for name, value, least in (("threads", threads, 0), ("repeats", repeats, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    options = {"device": device, "update": update, "threads": threads, "repeats": repeats}
    return [measure_apart(config, backend=name, **options) for name in ("auto", "reference")]


def cost_table(costs: list[StepCost]) -> str:
    """Markdown table of `compare`'s result, with the ratio of naive to fused."""
    fused, naive = costs
    lines = ["| attention | backend | step, s | peak memory, MiB |", "| --- | --- | --- | --- |"]
    for label, cost in (("fused", fused), ("naive", naive)):
        lines.append(f"| {label} | {cost.backend} | {cost.seconds:.2f} | {cost.peak_mib:.0f} |")
    lines.append(f"| naive / fused | | {naive.seconds / fused.seconds:.1f} | {naive.peak_mib / fused.peak_mib:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Reads a request of `measure_apart` from stdin and prints the cost as JSON."""
    request = json.load(sys.stdin)
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    config = from_dict(TrainConfig, request["recipe"])
    print(json.dumps(asdict(measure(config, **request["options"]))))


if __name__ == "__main__":
    main()
