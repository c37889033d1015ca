"""`python -m gans throughput`: how many images a second a generator makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.utils.benchmark import Timer

from gans.commands.generators import (
    Weights,
    attention_backend,
    check_backend,
    labels_of,
    latents,
    load_generator,
)
from gans.common.distributed import choose_device
from gans.models.conditioning import bind
from gans.recipes.named import preset
from gans.recipes.registry import build


@dataclass(frozen=True)
class ThroughputArguments:
    """Times a generator without training, and prints a Markdown table: images a second by batch size, and on a GPU the
    most memory that torch used.
    """

    checkpoint: Path | None = None
    """A run's folder (its newest checkpoint), a checkpoint, or a folder that convert or export has written."""
    preset: str = ""
    """Instead of a checkpoint: a recipe, whose generator is timed with its initial weights."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Batch sizes."""
    seconds: float = 2.0
    """How long each is timed."""
    bf16: bool = False
    """Matrix products in bfloat16 (autocast)."""
    weights: Weights = "generator_ema"
    """The averaged generator, or the one under training."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device."""
    backend: str | None = None
    """Attention backend of natten_ext; None leaves its choice."""

    def __post_init__(self) -> None:
        if bool(self.checkpoint) == bool(self.preset):
            raise ValueError("give either checkpoint or preset")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches is {self.batches}; give sizes of at least 1")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds is {self.seconds}; it must be positive and finite")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}; it cannot be negative")

    def generator(self, device: torch.device) -> nn.Module:
        """What is to be timed."""
        if self.checkpoint:
            return load_generator(self.checkpoint, device, self.weights)
        return build(preset(self.preset).generator).eval().requires_grad_(False).to(device)


def run(arguments: list[str]) -> None:
    options = tyro.cli(ThroughputArguments, args=arguments, prog="python -m gans throughput")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    generator = options.generator(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
        check_backend(generator, options.backend)
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    precision = "bfloat16" if options.bf16 else "float32"
    print(f"{options.checkpoint or options.preset} on {where}, {precision}, median of {options.seconds:g} s each\n")
    print("| batch | ms | images a second |" + (" MiB |" if on_gpu else ""))
    print("| --- | --- | --- |" + (" --- |" if on_gpu else ""))
    for batch in options.batches:
        seeds = range(batch)
        z = latents(seeds, generator.config.latent_dim).to(device)
        model = bind(generator, labels_of(generator, seeds))
        timer = Timer("model(z)", globals={"model": model, "z": z}, num_threads=torch.get_num_threads())
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        with (
            torch.inference_mode(),
            attention_backend(options.backend),
            torch.autocast(device.type, torch.bfloat16, enabled=options.bf16),
        ):
            seconds = timer.blocked_autorange(min_run_time=options.seconds).median
        memory = f" {torch.cuda.max_memory_allocated(device) / 2**20:.0f} |" if on_gpu else ""
        print(f"| {batch} | {1000 * seconds:.1f} | {batch / seconds:.1f} |{memory}")
