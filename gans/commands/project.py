"""`python -m gans project`: the latent of a given image, with a picture of the way to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from gans.commands.generators import Weights, attention_backend, check_backend, class_of, load_generator
from gans.common.distributed import choose_device
from gans.common.files import new_folder, save_tensors
from gans.data.decoding import decode
from gans.data.images import GAP, grid, save_png
from gans.data.loading import to_array, to_unit_range
from gans.evaluation.projection import ProjectionConfig, project
from gans.features.by_name import make_maps
from gans.models.conditioning import bind

COLUMNS = 8
"""Images of the picture of the way, besides the one that is given."""


@dataclass(frozen=True)
class ProjectArguments:
    """Looks for the latent whose image is nearest to a given one: in w with a mapping network, else in z.

    Writes into a folder way.png (the given image, then those on the way), projected.png and latent.safetensors.
    """

    checkpoint: Path
    """A run's folder (its newest checkpoint), a checkpoint, or a folder that convert or export has written."""
    image: Path
    """The image; it is resized as training does it."""
    out: Path
    """Folder to write; it must not exist."""
    projection: Annotated[ProjectionConfig, tyro.conf.arg(name="")] = field(default_factory=ProjectionConfig)
    network: Literal["lite1", "random", "none"] = "lite1"
    """Network whose maps are compared beside the pixels: EfficientNet-Lite1, one with random weights, or none."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """The class of the image, by name or number, for a generator with classes."""
    weights: Weights = "generator_ema"
    """The averaged generator, or the one under training."""
    scale: int = 4
    """Whole factor by which pixels are enlarged in the pictures."""
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device."""
    backend: str | None = None
    """Attention backend of natten_ext; None leaves its choice."""

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"scale is {self.scale}; it must be at least 1")
        if self.network == "none" and not self.projection.pixels:
            raise ValueError("network is 'none' and pixels is 0; there is nothing to compare")


def run(arguments: list[str]) -> None:
    options = tyro.cli(ProjectArguments, args=arguments, prog="python -m gans project")
    device = choose_device(options.device)
    generator = load_generator(options.checkpoint, device, options.weights)
    check_backend(generator, options.backend)
    classes = getattr(generator.config, "classes", 0)
    if classes and options.class_ is None:
        raise ValueError(f"class is not given; the generator has {classes}, and an image is projected in one of them")
    label = None if options.class_ is None else torch.tensor([class_of(generator, options.class_)], device=device)
    size, channels = generator.config.image_size, generator.config.channels
    image = decode(options.image.read_bytes, repr(str(options.image)))
    target = to_unit_range(torch.from_numpy(to_array(image, size, channels).copy()))[None].to(device)
    network = None if options.network == "none" else make_maps(options.network).to(device)
    steps = options.projection.steps
    shown = {round(i * (steps - 1) / (COLUMNS - 2)) for i in range(COLUMNS - 1)}
    way = []
    with new_folder(options.out) as folder, tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:

        def report(step: int, loss: float, images: torch.Tensor) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.4g}")
            if step in shown:
                way.append(images.cpu())

        with attention_backend(options.backend):
            found = project(bind(generator, label), target, options.projection, features=network, report=report)
        pictures = torch.cat([target.cpu(), *way, found.image.cpu()])
        save_png(grid(pictures, len(pictures), gap=GAP), folder / "way.png", scale=options.scale)
        save_png(grid(found.image), folder / "projected.png", scale=options.scale)
        code = found.code.cpu().contiguous()
        about = {"space": found.space, "image": options.image.name, "checkpoint": str(options.checkpoint)}
        save_tensors({found.space: code}, folder / "latent.safetensors", about)
    error = (found.image.clamp(-1, 1) - target).square().mean().sqrt().item()
    print(
        f"wrote {options.out}: {found.space} {tuple(code.shape)}; pixels differ by {error:.3g} (root mean square of 2)"
    )
