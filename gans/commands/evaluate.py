"""`python -m gans evaluate`: how far generated images are from real ones, and real ones from real ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from torch import Tensor

from gans.commands.generators import Weights, attention_backend, check_backend, class_of, load_generator, render
from gans.common.distributed import choose_device
from gans.common.files import new_file
from gans.data.sources import ImageSource, open_source
from gans.evaluation.reference import (
    Reference,
    choose,
    default_cache,
    features_of,
    measure,
    read_batches,
    split_for_floor,
)
from gans.features.by_name import make_vectors


@dataclass(frozen=True)
class EvaluateArguments:
    """Frechet and kernel distance, precision and recall of generated images against real ones.

    The generated images come from a checkpoint (made for the purpose) or from a folder or ZIP file. Beside each value
    stands what real images get against real images: no generator can be expected to do better.
    """

    reference: str
    """The real images: a folder, a ZIP file, CIFAR-10's archive, or "digits"."""
    checkpoint: Path | None = None
    """A run's folder (its newest checkpoint), a checkpoint, or a folder that convert has written."""
    images: str | None = None
    """Instead of a checkpoint: a folder or ZIP file of generated images."""
    networks: tuple[Literal["judge", "lite1", "inception"], ...] = ("lite1",)
    """Networks to measure over, one or more: judge (needs --judge), lite1, inception."""
    judge: Path | None = None
    """A file of train-judge."""
    inception_weights: Path | None = None
    """Inception's weights: NVIDIA's TorchScript file, or torch-fidelity's; without a file torch-fidelity downloads
    its own."""
    count: int = 10_000
    """Images to make with the checkpoint (seeds 0, 1, 2...), or the most to take of --images (at random); 0 for all of
    these."""
    reference_count: int = 50_000
    """The most real images to use, chosen at random; 0 for all."""
    reference_split: str = "train"
    """Which split of the reference, where it has several."""
    size: int = 0
    """Side to which all images are brought first; 0 for the generator's, or that of the first of --images."""
    neighbours: int = 3
    """Neighbours that decide how far a point's neighbourhood reaches, for precision and recall."""
    manifold_count: int = 5000
    """The most images of each set that precision and recall compare; memory grows with its square."""
    truncation: float = 1.0
    """How far w may lie from its mean, from 0 to 1, for generators with a mapping network; 1 changes nothing."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """The class of all images that the checkpoint makes, by name or number; they are compared with the real images of
    that class, where the reference has labels. Without it, equally many of each class."""
    weights: Weights = "generator_ema"
    """The averaged generator, or the one under training."""
    cache: Path | None = None
    """Folder of the reference's features; by default ~/.cache/natten_ext (or $XDG_CACHE_HOME/natten_ext)."""
    use_cache: bool = True
    """Whether to read and write the cache."""
    json: Path | None = None
    """A file to write the numbers to as well."""
    batch: int = 64
    """Images at a time, of the networks and the generator."""
    workers: int = 0
    """Processes that decode ahead; 0 decodes in this one."""
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device."""
    backend: str | None = None
    """Attention backend of natten_ext for the generator; None leaves its choice."""

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.images is None):
            raise ValueError("give one of checkpoint and images")
        if self.class_ is not None and self.images is not None:
            raise ValueError(f"class is {self.class_!r}, which is for images that a checkpoint makes; leave it out")
        if not self.networks or len(set(self.networks)) < len(self.networks):
            raise ValueError(f"networks is {self.networks}; name each network once, and at least one")
        for name in ("count", "reference_count", "size", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        for name, least in (("batch", 1), ("neighbours", 1), ("manifold_count", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.manifold_count < self.neighbours + 2:
            raise ValueError(
                f"manifold_count is {self.manifold_count}; {self.neighbours} neighbours need 2 more images"
            )
        least = self.neighbours + 2
        if self.count < least and (self.checkpoint or self.count):
            raise ValueError(f"count is {self.count}; {self.neighbours} neighbours need {least} images or more")


@dataclass(frozen=True)
class Generated:
    """The images to be judged: how many, of what size, and the images batch by batch."""

    name: str
    count: int
    size: int
    channels: int
    batches: Iterable[Tensor]
    class_name: str | None = None
    """The class of all of them, if they were asked for by class."""


def from_checkpoint(options: EvaluateArguments) -> Generated:
    assert options.checkpoint is not None
    generator = load_generator(options.checkpoint, choose_device(options.device), options.weights)
    check_backend(generator, options.backend)
    config = generator.config
    if options.size not in (0, config.image_size):
        raise ValueError(f"size is {options.size}, but the generator makes {config.image_size} px; leave it out")
    settings = {"batch": options.batch, "truncation": options.truncation, "name": options.class_}
    batches = render(generator, range(options.count), **settings)
    name, asked = f"{options.checkpoint} (seeds 0-{options.count - 1})", None
    if options.class_ is not None:
        number, names = class_of(generator, options.class_), list(generator.class_names)  # type: ignore[arg-type]
        asked = names[number] if names else str(number)
        name += f", class {asked}"
    return Generated(name, options.count, config.image_size, config.channels, batches, asked)


def from_images(options: EvaluateArguments) -> Generated:
    assert options.images is not None
    source = open_source(options.images)
    first = source.open(0)
    size = options.size or min(first.size)
    channels = 1 if first.mode in ("L", "1", "I", "I;16") else 3
    rows = choose(len(source), options.count)

    batches = read_batches(source, rows, size=size, channels=channels, batch=options.batch, workers=options.workers)
    return Generated(options.images, len(rows), size, channels, batches)


def label_in(source: ImageSource, name: str, class_name: str | None) -> int | None:
    """The label of the class called `class_name` in a source; None without a class, or where the source has no labels.

    ValueError where it has labels and no such class.
    """
    if class_name is None or source.labels is None:
        return None
    if class_name not in source.classes:
        known = f"{', '.join(source.classes[:20])}{' ...' * (len(source.classes) > 20)}"
        raise ValueError(f"class is {class_name!r}, which reference {name!r} has not; it has {known}")
    return source.classes.index(class_name)


def run(arguments: list[str]) -> None:
    options = tyro.cli(EvaluateArguments, args=arguments, prog="python -m gans evaluate")
    device = choose_device(options.device)
    networks = [
        make_vectors(name, judge=options.judge, inception_weights=options.inception_weights).to(device)
        for name in options.networks
    ]
    generated = from_checkpoint(options) if options.checkpoint else from_images(options)
    source = open_source(options.reference, options.reference_split)
    label = label_in(source, options.reference, generated.class_name)
    name = options.reference if label is None else f"{options.reference}, class {generated.class_name}"
    reference = Reference(source, name, generated.size, generated.channels, options.reference_count, label)
    cache = (options.cache or default_cache()) if options.use_cache else None
    with attention_backend(options.backend):
        fakes = features_of(generated.batches, networks, device, total=generated.count, description=generated.name)
    results: dict[str, dict[str, float]] = {}
    notes = []
    for network, fake in zip(networks, fakes, strict=True):
        real = reference.features(network, device, batch=options.batch, workers=options.workers, cache=cache)
        rest, held = split_for_floor(real, len(fake))
        settings = {"neighbours": options.neighbours, "manifold": options.manifold_count}
        values = measure(real, fake, network.name, **settings)
        floors = measure(rest, held, network.name, **settings)
        results |= {name: {"value": value, "real_against_real": floors[name]} for name, value in values.items()}
        notes.append(f"{network.name}: {network.about}; {network.num_features} features")
        if len(fake) <= network.num_features:
            notes.append(
                f"  {len(fake)} images are too few for {network.num_features} features: their Frechet distance is "
                "inflated, like its real-against-real value"
            )

    print(f"{generated.name}: {len(fake):,} images of {generated.size} px")
    print(f"against {reference.name}: {len(real):,} images")
    print(f"real against real: {len(held):,} of the reference against its other {len(rest):,}")
    print("\n".join(notes))
    print(table(results))
    if options.json:
        with new_file(options.json) as partial:
            about = {
                "generated": generated.name,
                "reference": reference.name,
                "images": {"generated": len(fake), "reference": len(real), "real_against_real": [len(held), len(rest)]},
                "size": generated.size,
                "networks": {network.name: network.about for network in networks},
                "measures": results,
            }
            partial.write_text(json.dumps(about, indent=2) + "\n")
        print(f"wrote {options.json}")


def table(results: dict[str, dict[str, float]]) -> str:
    """The measures as lines of text, each with its real-against-real value."""
    lines = [f"{'measure':<22}{'images':>12}{'real against real':>20}"]
    lines += [f"{name:<22}{row['value']:>12.5g}{row['real_against_real']:>20.5g}" for name, row in results.items()]
    return "\n".join(lines)
