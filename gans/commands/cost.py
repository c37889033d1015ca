"""`python -m gans cost`: what a training step of a recipe takes, with fused and with naive attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import tyro

from gans.recipes.named import preset
from gans.training.profile import Update, compare, cost_table


@dataclass(frozen=True)
class CostArguments:
    """Measures a training step with fused and with naive attention side by side: time, and memory at its peak.

    Memory is what the step needs beyond weights, optimisers and images.
    """

    preset: str
    """Recipe; `python -m gans presets` lists them."""
    batch: int = 0
    """Images in each update; 0 for the recipe's batches."""
    update: Update = "discriminator"
    """The discriminator's update with its penalty, the generator's, or both."""
    precision: str = ""
    """fp32, bf16 or fp64; the recipe's if not given."""
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    repeats: int = 3
    """Steps that are timed, of which the median is shown."""

    def __post_init__(self) -> None:
        if self.batch < 0:
            raise ValueError(f"batch is {self.batch}; it cannot be negative")


def run(arguments: list[str]) -> None:
    """Prints a Markdown table."""
    parsed = tyro.cli(CostArguments, args=arguments, prog="python -m gans cost")
    recipe = preset(parsed.preset)
    if parsed.batch:
        recipe = replace(recipe, batch_d=parsed.batch, batch_g=parsed.batch, accumulate=1)
    if parsed.precision:
        recipe = replace(recipe, precision=parsed.precision)
    options = {"device": parsed.device, "threads": parsed.threads, "repeats": parsed.repeats}
    print(cost_table(compare(recipe, update=parsed.update, **options)))
