"""`python -m gans interpolate`: a walk through the latent space from seed to seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from gans.commands.generators import (
    RenderArguments,
    Space,
    attention_backend,
    labels_of,
    latents,
    parse_numbers,
    render,
    to_codes,
)
from gans.common.files import new_file
from gans.data.images import enlarge, grid, save_png, to_pil

VIDEO = (".mp4", ".webm", ".mkv")


@dataclass(frozen=True, kw_only=True)
class InterpolateArguments(RenderArguments):
    """Writes an animation from seed to seed and, beside it, a contact sheet with one row for each pair of seeds.

    z is interpolated on the great circle (slerp), since z ~ N(0, I) lies close to a sphere; w linearly.
    """

    out: Path
    """A .gif file, or with `pip install 'imageio[ffmpeg]'` a video (.mp4, .webm, .mkv). The contact sheet gets
    the same name, ending in -sheet.png."""
    seeds: str = "0-5"
    """The seeds on the way, such as 4,0-3; at least two."""
    steps: int = 24
    """Frames from one seed to the next."""
    loop: bool = True
    """Walk back from the last seed to the first."""
    fps: float = 12.0
    """Frames a second."""
    sheet_columns: int = 9
    """Images in a row of the contact sheet, both seeds included."""
    space: Space = "z"
    """Where to interpolate: z, or w for a generator with a mapping network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("steps", 1), ("sheet_columns", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0.01 <= self.fps < math.inf:  # a GIF's frame lasts 655 seconds at most
            raise ValueError(f"fps is {self.fps}; it must be at least 0.01 and finite")


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation between vectors `a` and `b` `(D,)` at `t` `(N,)` in [0, 1], `(N, D)`.

    sin((1-t) o) / sin(o) a + sin(t o) / sin(o) b with o the angle between them (Shoemake 1985); for vectors on
    almost one line, where that is 0 / 0, a straight line.
    """
    t = t[:, None].double()
    cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).clamp(-1, 1)
    angle = cosine.acos()
    if angle.sin() < 1e-6:
        return ((1 - t) * a + t * b).to(a.dtype)
    return (((1 - t) * angle).sin() / angle.sin() * a + (t * angle).sin() / angle.sin() * b).to(a.dtype)


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Linear interpolation between `a` and `b` of any one shape at `t` `(N,)`, `(N, *shape)`."""
    return torch.lerp(a[None], b[None], t.view(-1, *[1] * a.dim()).to(a))


def run(arguments: list[str]) -> None:
    options = tyro.cli(InterpolateArguments, args=arguments, prog="python -m gans interpolate")
    seeds = parse_numbers("seeds", options.seeds)
    if len(seeds) < 2:
        raise ValueError(f"seeds is {options.seeds!r}; an interpolation needs at least two")
    suffix = options.out.suffix.lower()
    if suffix not in (".gif", *VIDEO):
        raise ValueError(f"out is {str(options.out)!r}; its name must end in .gif or {', '.join(VIDEO)}")
    if suffix in VIDEO:
        _imageio()  # a missing library is found before the work, not after it
    generator = options.load_generator()
    device = next(generator.parameters()).device
    codes = latents(seeds, generator.config.latent_dim)
    if options.space == "w":
        labels = labels_of(generator, seeds, options.class_)
        codes = to_codes(generator, codes.to(device), labels, space="w", truncation=options.truncation).cpu()

    def walk(pairs: list[tuple[int, int]], times: Tensor) -> Tensor:
        """Codes at `times` between each pair of places in `seeds`, one after the other."""
        between = slerp if options.space == "z" else lerp
        return torch.cat([between(codes[i], codes[j], times) for i, j in pairs])

    def images_of(path: Tensor, description: str) -> Tensor:
        """All have the noise and, in z, the class of the first seed, so that nothing but the codes changes."""
        space, same = options.space, [seeds[0]] * len(path)
        if space == "z" and options.truncation < 1:
            labels = labels_of(generator, same, options.class_)
            path, space = to_codes(generator, path.to(device), labels, truncation=options.truncation), "w"
        batches = render(generator, same, batch=options.batch, codes=path, space=space, name=options.class_)
        return torch.cat(list(tqdm(batches, desc=description, unit="batch", dynamic_ncols=True)))

    pairs = [(i, i + 1) for i in range(len(seeds) - 1)]
    rows = walk(pairs, torch.linspace(0, 1, options.sheet_columns))
    times = torch.arange(options.steps) / options.steps
    way = walk([*pairs, (len(seeds) - 1, 0)], times) if options.loop else torch.cat([walk(pairs, times), codes[-1:]])
    sheet = options.out.with_name(f"{options.out.stem}-sheet.png")
    with attention_backend(options.backend):
        save_png(grid(images_of(rows, "contact sheet"), options.sheet_columns), sheet, scale=options.scale)
        save_animation(images_of(way, "frames"), options.out, fps=options.fps, scale=options.scale)
    print(f"wrote {options.out} ({len(way)} frames) and {sheet}")


def save_animation(images: Tensor, path: Path, *, fps: float, scale: int = 1) -> None:
    """Writes images `(N, C, H, W)` in [-1, 1] as a GIF (endless) or, by its suffix, a video, which appears when it is
    complete; makes the folder.
    """
    frames = [enlarge(to_pil(image), scale) for image in images]
    with new_file(path) as partial:
        if path.suffix.lower() == ".gif":
            # GIF counts hundredths of a second, and many viewers slow down what is faster than two of them.
            duration = max(20, round(1000 / fps))
            frames[0].save(partial, save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=False)
            return
        with _imageio().get_writer(partial, fps=fps, macro_block_size=2) as writer:
            for frame in frames:
                writer.append_data(np.asarray(frame.convert("RGB")))


def _imageio():
    try:
        import imageio.v2
        import imageio_ffmpeg  # noqa: F401 imageio's writer of videos
    except ModuleNotFoundError as error:
        raise ValueError(f"a video needs {error.name}: pip install 'imageio[ffmpeg]', or write a .gif") from error
    return imageio.v2
