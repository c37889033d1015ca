"""`python -m gans sample`: images from a checkpoint, one for each seed."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from gans.commands.generators import (
    RenderArguments,
    attention_backend,
    parse_numbers,
    render,
)
from gans.common.files import new_file
from gans.data.images import enlarge, grid, save_png, to_pil


@dataclass(frozen=True, kw_only=True)
class SampleArguments(RenderArguments):
    """Writes the images of some seeds, as one grid or as one file each.

    A seed always gives the same image (up to rounding, between devices and backends), whichever other seeds are
    asked for and however large the batches are.
    """

    out: Path
    """A PNG file for a grid of all images; a ZIP file or a folder for one PNG per seed (seed00000007.png)."""
    seeds: str = "0-63"
    """Seeds, such as 0-63,100; a range includes both ends."""
    columns: int = 0
    """Images in a row of the grid; 0 for a square."""
    gap: int = 0
    """White pixels between the images of the grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("columns", "gap"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")


def run(arguments: list[str]) -> None:
    options = tyro.cli(SampleArguments, args=arguments, prog="python -m gans sample")
    seeds = parse_numbers("seeds", options.seeds)
    suffix = options.out.suffix.lower()
    if suffix != ".png" and len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {options.seeds!r}, which names a seed twice; each has one file")
    if suffix not in ("", ".png", ".zip") or (suffix != "" and options.out.is_dir()):
        raise ValueError(f"out is {str(options.out)!r}; give a .png file, a .zip file or a folder")
    generator = options.load_generator()
    with attention_backend(options.backend):
        batches = render(generator, seeds, batch=options.batch, truncation=options.truncation, name=options.class_)
        bar = tqdm(total=len(seeds), unit="image", dynamic_ncols=True)
        if suffix == ".png":
            images = []
            for part in batches:
                images.append(part)
                bar.update(len(part))
            picture = grid(torch.cat(images), options.columns or None, options.gap)
            save_png(picture, options.out, scale=options.scale)
        else:
            with open_files(options.out) as write:
                for image in (image for part in batches for image in part):
                    write(f"seed{seeds[bar.n]:08d}.png", enlarge(to_pil(image), options.scale))
                    bar.update()
        bar.close()
    print(f"wrote {options.out} ({len(seeds)} images)")


@contextmanager
def open_files(path: Path) -> Iterator[Callable[[str, Image.Image], None]]:
    """A function that writes an image under a name into a folder, or a ZIP file that appears when it is complete."""
    if path.suffix.lower() != ".zip":
        path.mkdir(parents=True, exist_ok=True)
        yield lambda name, image: save_png(image, path / name)
        return

    def add(name: str, image: Image.Image) -> None:
        content = io.BytesIO()
        image.save(content, "PNG")
        archive.writestr(name, content.getvalue())

    with new_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed
        yield add
