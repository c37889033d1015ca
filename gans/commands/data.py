"""`python -m gans data`: what is in a folder or archive of images, and which files are broken."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import tyro
from tqdm import tqdm

from gans.data.sources import BrokenImageError, open_source


@dataclass(frozen=True)
class DataArguments:
    """Reads every image once, counts sizes and labels, and names the files that cannot be read."""

    data: str
    """Folder, ZIP file or CIFAR-10 archive (.tar.gz) of images, or "digits"."""
    split: str = "train"
    """Which split of the data to use, where it has several."""


def run(arguments: list[str]) -> None:
    """Prints a summary; ValueError, naming the files, if some are broken or lack their labels."""
    parsed = tyro.cli(DataArguments, args=arguments, prog="python -m gans data")
    source = open_source(parsed.data, parsed.split)
    kinds: Counter[str] = Counter()
    broken = []
    for index in tqdm(range(len(source)), unit="image"):
        try:
            image = source.open(index)
        except BrokenImageError as error:
            broken.append(str(error))
            continue
        kinds[f"{image.width}x{image.height} {image.mode}"] += 1
    print(f"{len(source)} images")
    for kind, count in kinds.most_common(10):
        print(f"  {count} of {kind}")
    if len(kinds) > 10:
        print(f"  and {len(kinds) - 10} more sizes")
    problems = [f"{len(broken)} files cannot be read:", *broken] if broken else []
    try:
        classes = source.classes
    except ValueError as error:
        problems.append(str(error))
    else:
        if classes:
            print(f"{len(classes)} classes: {', '.join(classes[:20])}{' ...' * (len(classes) > 20)}")
    if problems:
        raise ValueError("\n".join(problems))
