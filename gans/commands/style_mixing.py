"""`python -m gans style-mixing`: a table of images that have some styles of one seed and the rest of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from gans.commands.generators import (
    RenderArguments,
    attention_backend,
    labels_of,
    latents,
    parse_numbers,
    render,
    to_codes,
)
from gans.data.images import grid, save_png


@dataclass(frozen=True, kw_only=True)
class StyleMixingArguments(RenderArguments):
    """Draws a table: each image has the styles of its row's seed, but in some blocks those of its column's seed.

    The first column and the first row show the seeds themselves. Source: style mixing, StyleGAN, arXiv 1812.04948,
    figure 3.
    """

    out: Path
    """A PNG file."""
    rows: str = "0-3"
    """Seeds of the rows, such as 0-3,100; a range includes both ends."""
    columns: str = "4-9"
    """Seeds of the columns."""
    blocks: str | None = None
    """The generator's blocks that follow the column's seed, such as 0-3; 0 is the first one. None is the first four, or
    half of them where there are fewer than eight."""


def mixed_styles(rows: Tensor, columns: Tensor, blocks: Sequence[int], count: int) -> Tensor:
    """w of every image of the table for each of `count` blocks, `(1 + R, 1 + C, count, D)`.

    `rows` is `(R, D)` and `columns` `(C, D)`; `blocks` follow the columns. Row 0 has the columns' own styles, column 0
    the rows'; their corner is zeros.
    """
    table = rows.new_zeros(1 + len(rows), 1 + len(columns), count, rows.shape[1])
    table[1:] = rows[:, None, None]
    table[0, 1:] = columns[:, None]
    table[1:, 1:, list(blocks)] = columns[:, None]
    return table


def run(arguments: list[str]) -> None:
    options = tyro.cli(StyleMixingArguments, args=arguments, prog="python -m gans style-mixing")
    if options.out.suffix.lower() != ".png":
        raise ValueError(f"out is {str(options.out)!r}; its name must end in .png")
    rows, columns = (parse_numbers(name, getattr(options, name)) for name in ("rows", "columns"))
    blocks = None if options.blocks is None else parse_numbers("blocks", options.blocks)
    generator = options.load_generator()
    device = next(generator.parameters()).device
    dim = generator.config.latent_dim
    w_rows, w_columns = (
        to_codes(
            generator,
            latents(seeds, dim).to(device),
            labels_of(generator, seeds, options.class_),
            space="w",
            truncation=options.truncation,
        )
        for seeds in (rows, columns)
    )
    count = generator.config.blocks
    if blocks is None:
        blocks = list(range(min(4, count // 2)))
    if max(blocks) >= count:
        raise ValueError(f"blocks is {options.blocks!r}; this generator has blocks 0 to {count - 1}")
    codes = mixed_styles(w_rows, w_columns, blocks, count).flatten(0, 1)
    noise = [seed for row in (rows[0], *rows) for seed in [row] * (1 + len(columns))]
    with attention_backend(options.backend):
        batches = render(generator, noise, batch=options.batch, codes=codes, space="w")
        images = torch.cat(list(tqdm(batches, desc="images", unit="batch", dynamic_ncols=True)))
    images[0] = 1  # the corner, which belongs to no seed, is white
    save_png(grid(images, 1 + len(columns)), options.out, scale=options.scale)
    print(f"wrote {options.out} ({len(rows)} x {len(columns)} images)")
