"""`python -m gans data`: what is in a folder or archive of images, which are broken; images packed for training."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import tyro
from tqdm import tqdm

from gans.data.decoding import BrokenImageError
from gans.data.packing import check_destination, pack
from gans.data.sources import ImageSource, open_source
from gans.evaluation.reference import read_batches


@dataclass(frozen=True)
class DataArguments:
    """Reads every image once, counts sizes and labels, and names the files that cannot be read.

    With `--convert` it writes the images in one size instead, as PNG, with their labels.
    """

    data: str
    """Folder or ZIP file of images, shards (.tar) or .parquet files (several by a pattern), hf:NAME on the Hugging Face
    hub, CIFAR-10 archive (.tar.gz), or "digits"."""
    split: str = "train"
    """Which split of the data to use, where it has several."""
    convert: str | None = None
    """Where to write them: NAME.zip, as stylegan3 reads it, or WebDataset shards, such as 'NAME-{000..009}.tar'."""
    size: int = 0
    """Width and height to convert to: the model's."""
    channels: int = 3
    """Channels to convert to: 3, or 1 for grey."""
    workers: int = 0
    """Processes that decode while images are converted; 0 decodes in this one."""

    def __post_init__(self) -> None:
        if (self.size < 1) if self.convert else self.size:
            what = "it must be at least 1" if self.convert else "it goes with convert, where to write the images"
            raise ValueError(f"size is {self.size}; {what}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; it must be 1 or 3")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it cannot be negative")


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def convert(source: ImageSource, options: DataArguments) -> None:
    """Writes the images of `source` in one size; BrokenImageError, and no file, if one cannot be read."""
    assert options.convert
    files = check_destination(options.convert)
    labels, count = source.labels, len(source)
    shape = {"size": options.size, "channels": options.channels}
    batches = read_batches(source, list(range(count)), **shape, batch=32, workers=options.workers)
    images = (image for batch in batches for image in batch.numpy())
    pack(tqdm(images, total=count, unit="image"), count, labels, source.classes, files)
    about = f"{len(source.classes)} classes" if labels else "no labels"
    print(f"wrote {options.convert}: {_counted(count, 'image')} of {options.size}x{options.size}, {about}")


def run(arguments: list[str]) -> None:
    """Prints a summary; ValueError, naming the files, if some are broken or lack their labels."""
    parsed = tyro.cli(DataArguments, args=arguments, prog="python -m gans data")
    source = open_source(parsed.data, parsed.split)
    if parsed.convert:
        convert(source, parsed)
        return
    kinds: Counter[str] = Counter()
    broken = []
    for index in tqdm(range(len(source)), unit="image"):
        try:
            image = source.open(index)
        except BrokenImageError as error:
            broken.append(str(error))
            continue
        kinds[f"{image.width}x{image.height} {image.mode}"] += 1
    print(_counted(len(source), "image"))
    for kind, count in kinds.most_common(10):
        print(f"  {count} of {kind}")
    if len(kinds) > 10:
        print(f"  and {len(kinds) - 10} more sizes")
    problems = [f"{_counted(len(broken), 'file')} cannot be read:", *broken] if broken else []
    try:
        classes = source.classes
    except ValueError as error:
        problems.append(str(error))
    else:
        if classes:
            print(f"{len(classes)} classes: {', '.join(classes[:20])}{' ...' * (len(classes) > 20)}")
    if problems:
        raise ValueError("\n".join(problems))
