"""`python -m gans train`: the configurations' fields are the options."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from gans.common.distributed import join
from gans.common.files import missing, remove_empty
from gans.data.sources import open_source
from gans.recipes import registry
from gans.recipes.config import RunConfig, TrainConfig
from gans.recipes.named import PRESETS, preset
from gans.training import checkpoint
from gans.training.dry_run import check_files, describe
from gans.training.interrupt import Interrupted
from gans.training.loop import train

RUNS = Path("runs")
"""Where runs go whose folder is not named."""


@dataclass(frozen=True)
class TrainArguments:
    """Trains a recipe. Every setting of the preset can be overridden. Start it with torchrun for several processes."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    recipe: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str = "cifar10"
    """Recipe to start from; `python -m gans presets` lists them."""
    generator: str | None = None
    """Take the generator of another preset, or another kind of generator with its default settings."""
    discriminator: str | None = None
    """Take the discriminator of another preset, or another kind of discriminator with its default settings."""
    loss: str | None = None
    """Take the loss of another preset, or another kind of loss with its default settings."""
    conditional: bool = False
    """Tell both networks the labels of the data (sets generator.classes and discriminator.classes)."""
    dry_run: bool = False
    """Check the files that are named, print the resolved settings, parameter counts, estimated memory and attention
    shapes as JSON, and stop."""

    def __post_init__(self) -> None:
        self.recipe.check_run(self.run)


def parse(arguments: list[str]) -> TrainArguments:
    """The arguments of `train`: the preset's values, overridden by whatever is given."""
    name = _peek(arguments, "preset") or TrainArguments.preset
    recipe = preset(name)
    parts = {field: choice for field in registry.CHOICES if (choice := _peek(arguments, field))}
    default = TrainArguments(
        run=RunConfig(data=tyro.MISSING, out=""),
        recipe=_with_parts(recipe, parts),
        preset=name,
        **parts,
    )
    return tyro.cli(
        TrainArguments,
        args=arguments,
        default=default,
        prog="python -m gans train",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _peek(arguments: list[str], option: str) -> str | None:
    """The value of an option that decides the type of others, before they are parsed."""
    for i, argument in enumerate(arguments):
        if argument == f"--{option}" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"--{option}="):
            return argument.removeprefix(f"--{option}=")
    return None


def _with_parts(recipe: TrainConfig, parts: dict[str, str]) -> TrainConfig:
    """The recipe with some fields taken from elsewhere; ValueError for unknown names."""
    changed = {}
    for field, choice in parts.items():
        if choice in PRESETS:
            changed[field] = getattr(preset(choice), field)
        elif choice in registry.CHOICES[field]:
            changed[field] = registry.config_class(field, choice)()
        else:
            known = ", ".join({**registry.CHOICES[field], **PRESETS})
            raise ValueError(f"{field} must be a preset or a kind of {field}, one of {known}; got {choice!r}")
    # A new network comes in the size of the other one, if its size is a setting.
    if "discriminator" in changed:
        changed["discriminator"] = _resized(changed["discriminator"], changed.get("generator", recipe.generator))
    elif "generator" in changed:
        changed["generator"] = _resized(changed["generator"], recipe.discriminator)
    return replace(recipe, **changed)


def conditional(recipe: TrainConfig, data: str) -> TrainConfig:
    """The recipe with networks for the classes of the data; ValueError if it has no labels."""
    classes = len(open_source(data, recipe.images.split).classes)
    if not classes:
        raise ValueError(
            f"conditional needs labels, which data {data!r} has not: put each class in a folder of its own, or add "
            "dataset.json or metadata.csv"
        )
    generator, discriminator = (
        replace(recipe.generator, classes=classes),
        replace(recipe.discriminator, classes=classes),
    )
    return replace(recipe, generator=generator, discriminator=discriminator)


def next_folder(root: Path, preset: str, run: RunConfig) -> Path:
    """The folder in `root` for a run whose folder was not named: a number, the preset and the data, such as
    `00003-cifar10-images`. ValueError if it is to resume one.
    """
    if run.resume:
        raise ValueError(f"resume is {run.resume!r}; say with out which run it is that goes on")
    numbers = [int(path.name[:5]) for path in root.glob("[0-9][0-9][0-9][0-9][0-9]-*")]
    return root / f"{max(numbers, default=-1) + 1:05d}-{preset}-{_short(run.data)}"


@contextmanager
def new_folder(root: Path, preset: str, run: RunConfig) -> Iterator[Path]:
    """The folder of `next_folder`, made, or one after it where another run takes the number at the same moment. If
    nothing was put into it, it vanishes in the end.
    """
    made = missing(root)
    while True:
        folder = next_folder(root, preset, run)
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            if len(list(root.glob(f"{folder.name[:5]}-*"))) == 1:
                break
            folder.rmdir()  # of another preset or data
    try:
        yield folder
    finally:
        remove_empty([folder, *made])


def _short(data: str) -> str:
    """A name for a folder: of a file or pattern without what follows a dot, brace or the like."""
    found = re.match(r"[\w-]*\w", data.removesuffix("/").rpartition("/")[2].rpartition(":")[2])
    return found[0] if found else "data"


def _resized(config: Any, like: Any) -> Any:
    names = {field.name for field in fields(config)} & {"image_size", "channels", "classes"}
    return replace(config, **{name: getattr(like, name) for name in names})


def run(arguments: list[str]) -> int:
    """Trains, or prints what would be trained; returns the exit status."""
    parsed = parse(arguments)
    run_config = parsed.run
    recipe = conditional(parsed.recipe, parsed.run.data) if parsed.conditional else parsed.recipe
    world = join(parsed.run.device)
    with ExitStack() as stack:
        if not run_config.out:
            out = next_folder(RUNS, parsed.preset, run_config)
            if not parsed.dry_run:
                own = new_folder(RUNS, parsed.preset, run_config)
                out = world.from_main(stack.enter_context(own) if world.is_main else None)
            run_config = replace(run_config, out=str(out))
        try:
            if parsed.dry_run:
                check_files(recipe, run_config)
                shown = json.dumps(describe(recipe, run_config, world.size), indent=2)
            else:
                last = train(recipe, run_config, world=world)
                shown = f"last checkpoint: {last}"
                if (last.parent / checkpoint.BEST).exists():
                    shown += f"\nbest checkpoint: {last.parent / checkpoint.BEST}"
        except Interrupted as interrupt:
            if world.is_main:  # one process says it, before any ends: torchrun kills the others as soon as one has
                print(interrupt, file=sys.stderr, flush=True)
            if interrupt.together:
                world.barrier()
            world.leave()
            return interrupt.status
    if world.is_main:
        print(shown)
    world.leave()
    return 0
