"""`python -m gans attention-map`: where each head of each level of a generator looks, for one sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gans.commands.generators import Weights, attention_backend, check_backend, load_generator, render
from gans.common.distributed import choose_device
from gans.common.files import new_file
from gans.data.images import to_uint8
from gans.evaluation.attention_maps import Pixel, last_of_each_size, looks, plot, recorded


@dataclass(frozen=True)
class AttentionMapArguments:
    """Draws a figure: for chosen pixels of one sample, the exact attention weights of the modules of a generator.

    A row is a module; a map is the mean over the heads that share a dilation (StyleNAT) or over all heads.
    """

    checkpoint: Path
    """A run's folder (its newest checkpoint), a checkpoint, or a folder that convert has written."""
    out: Path
    """PNG file to write."""
    seed: int = 0
    """The sample."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Its class, by name or number, for generators with classes; without it, the seed modulo their number."""
    pixels: tuple[str, ...] = ()
    """Pixels as row,column, such as 32,32 10,50; none for the centre and a point up and to the left of it."""
    per_head: bool = False
    """A map for every head."""
    every_module: bool = False
    """A row for every attention module, instead of the last on each size of map."""
    truncation: float = 1.0
    """How far w may lie from its mean, from 0 to 1, for generators with a mapping network; 1 changes nothing."""
    weights: Weights = "generator_ema"
    """The averaged generator, or the one under training."""
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device."""
    backend: str | None = None
    """Attention backend of natten_ext for the sample; the weights are computed by plain PyTorch operations."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")


def parse_pixels(texts: tuple[str, ...], image_size: int) -> list[Pixel]:
    """Pixels from "row,column"; without any, the centre and a point up and to the left of it."""
    if not texts:
        return [(image_size // 2, image_size // 2), (image_size // 4, image_size // 3)]
    pixels = []
    for text in texts:
        numbers = text.split(",")
        if len(numbers) != 2 or not all(number.strip().isdigit() for number in numbers):
            raise ValueError(f"pixels has {text!r}; write row,column, such as 32,48")
        pixels.append((int(numbers[0]), int(numbers[1])))
    return pixels


def run(arguments: list[str]) -> None:
    options = tyro.cli(AttentionMapArguments, args=arguments, prog="python -m gans attention-map")
    if options.out.suffix.lower() != ".png":
        raise ValueError(f"out is {str(options.out)!r}; its name must end in .png")
    generator = load_generator(options.checkpoint, choose_device(options.device), options.weights)
    check_backend(generator, options.backend)
    size = generator.config.image_size
    pixels = parse_pixels(options.pixels, size)
    with attention_backend(options.backend), recorded(generator) as modules:
        (image,) = render(generator, [options.seed], truncation=options.truncation, name=options.class_)
    maps = looks(modules, pixels, size)
    if not maps:
        raise ValueError(f"{type(generator.config).__name__} describes a generator without attention that can be drawn")
    chosen = maps if options.every_module else last_of_each_size(maps)
    with new_file(options.out) as path:
        plot(chosen, to_uint8(image)[0], pixels, path, per_head=options.per_head)
    heads = {module.weights.shape[1] for module in chosen}
    print(f"wrote {options.out} ({len(chosen)} of {len(maps)} modules, {min(heads)} to {max(heads)} heads)")
