"""`python -m gans train-judge`: a classifier of one's own data, to measure generators by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from gans.common.distributed import choose_device
from gans.data.sources import open_source
from gans.evaluation.reference import choose, digest, read_batches
from gans.features.judge import JudgeConfig, Schedule, save_judge, train_judge
from gans.training.lock import check_folder


@dataclass(frozen=True)
class TrainJudgeArguments:
    """Trains a small classifier for evaluate: on the classes of labelled data, else on rotations."""

    data: str
    """The images: a folder, a ZIP file, CIFAR-10's archive, or "digits". Subfolders are classes."""
    out: Path
    """File to write (safetensors)."""
    task: Literal["auto", "classes", "rotation"] = "auto"
    """What it learns: the classes, the number of quarter turns, or the first of these that the data allows."""
    size: int = 32
    """Side of the images that it sees; what it judges is resized to it."""
    channels: int = 3
    """3 for colour, 1 for grey."""
    width: int = 32
    """Channels of its first layer."""
    features: int = 128
    """Channels of its last layer, whose means are the features."""
    split: str = "train"
    """Which split of the data, where it has several."""
    limit: int = 50_000
    """The most images to use, chosen at random; they are held in memory. 0 for all."""
    schedule: Annotated[Schedule, tyro.conf.arg(name="")] = field(default_factory=Schedule)
    workers: int = 0
    """Processes that decode the images; 0 decodes in this one."""
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device."""

    def __post_init__(self) -> None:
        if self.limit < 0 or self.workers < 0:
            raise ValueError(f"limit ({self.limit}) and workers ({self.workers}) cannot be negative")
        if self.out.suffix != ".safetensors":
            raise ValueError(f"out is {str(self.out)!r}; its name must end in .safetensors")
        if self.out.is_dir():
            raise ValueError(f"out is {str(self.out)!r}, which is a folder; it must be a file to write")


def run(arguments: list[str]) -> None:
    options = tyro.cli(TrainJudgeArguments, args=arguments, prog="python -m gans train-judge")
    check_folder(options.out.parent)
    source = open_source(options.data, options.split)
    task = options.task if options.task != "auto" else ("classes" if source.labels else "rotation")
    if task == "classes" and not source.labels:
        raise ValueError(f"data {options.data!r} has no classes; put each in a folder, or use --task rotation")
    classes = len(source.classes) if task == "classes" else 4
    config = JudgeConfig(options.size, options.channels, classes, options.width, options.features)
    device = choose_device(options.device)
    rows = choose(len(source), options.limit)
    labels = torch.tensor([source.labels[row] for row in rows]) if task == "classes" and source.labels else None
    batches = read_batches(source, rows, size=config.size, channels=config.channels, batch=256, workers=options.workers)
    steps = -(-len(rows) // 256)
    images = torch.cat(list(tqdm(batches, desc="reading", total=steps, unit="batch", dynamic_ncols=True)))

    with tqdm(total=options.schedule.epochs, unit="epoch", dynamic_ncols=True) as bar:

        def report(epoch: int, loss: float, accuracy: float) -> None:
            bar.write(f"epoch {epoch}: loss {loss:.3f}, {100 * accuracy:.1f} % right of the held-out images")
            bar.update()

        judge, accuracy = train_judge(config, options.schedule, images, labels, device=device, report=report)
    about = {
        "task": task,
        "data": Path(options.data).name,
        "data_sha256": digest(source),
        "classes": source.classes if task == "classes" else ["0", "90", "180", "270"],
        "images": len(rows),
        "held_out": round(options.schedule.held_out * len(rows)),
        "accuracy": accuracy,
        "epochs": options.schedule.epochs,
        "seed": options.schedule.seed,
    }
    save_judge(judge, options.out, about)
    print(f"wrote {options.out}: {task}, {100 * accuracy:.1f} % right of {about['held_out']:,} held-out images")
