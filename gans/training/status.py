"""What a run says of itself in a terminal: where it starts, and a line for each tick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gans.recipes.config import RunConfig, TrainConfig


def duration(seconds: float) -> str:
    """A time in the two largest of its units: `42s`, `3m 07s`, `5h 12m`, `2d 03h`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def banner(config: TrainConfig, run: RunConfig, resolved: Mapping[str, Any], step: int, images: int) -> str:
    """The data, the networks, the device and what is written where, of a run that starts at `step` with so many images
    to learn from; `resolved` as `config.json` has it.
    """
    size, channels = config.generator.image_size, config.generator.channels
    classes = f", {config.classes} classes" if config.classes else ""
    parameters = ", ".join(f"{name} {count:,}" for name, count in resolved["parameters"].items())
    several = f", {resolved['processes']} processes" if resolved["processes"] > 1 else ""
    metric = f", distance ({run.metric}) every {run.metric_every:,}" if run.metric_every else ""
    rows = {
        "data": f"{run.data}: {images:,} images{classes}, at {size}x{size}x{channels}",
        "networks": f"{resolved['recipe']['generator']['kind']} against {resolved['recipe']['discriminator']['kind']}",
        "parameters": parameters,
        "device": f"{resolved['device']}, {resolved['threads']} threads, {config.precision}{several}",
        "steps": f"{step:,} to {config.steps:,}, batches of {config.batch_d} and {config.batch_g}",
        "writes": f"{run.out}/: log.jsonl every {run.log_every:,} steps, samples/ every {run.sample_every:,}, "
        f"checkpoints/ every {run.checkpoint_every:,} ({run.keep} kept){metric}",
    }
    return "\n".join(f"{name:<12}{row}" for name, row in rows.items())


def status_line(
    *,
    tick: int,
    thousands: float,
    elapsed: float,
    per_thousand: float,
    memory: float,
    losses: Mapping[str, float],
    left: float,
    distance: float | None = None,
    best: bool = False,
) -> str:
    """One tick: its number, thousands of real images seen, time since the start, seconds per thousand images, memory in
    MiB, each network's loss, the last distance and the time that is left.
    """
    parts = [
        f"tick {tick:<5}",
        f"kimg {thousands:<9.1f}",
        f"time {duration(elapsed):<8}",
        f"s/kimg {per_thousand:<7.4g}",
        f"MiB {memory:<6.0f}",
        *(f"{name} {value:<7.3g}" for name, value in losses.items()),
    ]
    if distance is not None:
        parts.append(f"distance {distance:.4g}{' (best)' if best else ''}".ljust(24))
    return "  ".join([*parts, f"left {duration(left)}"])
