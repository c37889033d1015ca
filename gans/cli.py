"""Command line: `python -m gans COMMAND`. Each command is a module of `gans.tools`, imported when it is used."""

from __future__ import annotations

import importlib
import sys

from gans.steps import NonFiniteError

COMMANDS = {
    "train": "train a recipe:  train --preset cifar10 --data FOLDER|ZIP --out DIR [any override]",
    "presets": "list the recipes; with a name, print all of its settings",
    "data": "check images:  data --data FOLDER|ZIP",
    "cost": "time and memory of a step, fused and naive:  cost --preset cifar10 --batch 4",
    "figures": "draw a run's samples and curves:  figures --run DIR --out DIR",
    "sample": "images from a checkpoint:  sample --checkpoint DIR --seeds 0-63 --out FILE.png",
    "interpolate": "an animation from seed to seed:  interpolate --checkpoint DIR --seeds 0-5 --out FILE.gif",
    "style-mixing": "styles of two seeds in one image:  style-mixing --checkpoint DIR --rows 0-3 --columns 4-9 --out F",
    "attention-map": "where attention looks:  attention-map --checkpoint DIR --seed 0 --out FILE.png",
    "convert": "a published checkpoint to ours:  convert --checkpoint FILE.pth --preset cifar10 --out DIR",
    "evaluate": "distances to real images:  evaluate --reference FOLDER|ZIP --checkpoint DIR --networks lite1",
    "train-judge": "a network to measure over:  train-judge --data FOLDER|ZIP --out FILE.safetensors",
}
"""Each command with its line of help; the module's name has underscores for hyphens."""


def usage() -> str:
    """What `python -m gans` prints without a command."""
    lines = [f"  {name:<14}{line}" for name, line in COMMANDS.items()]
    head = "usage: python -m gans COMMAND [options]\n\ncommands:"
    return "\n".join([head, *lines, "\nEach command explains its options with --help."])


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status. Errors that a user can mend are one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        print(usage())
        return 0 if arguments and arguments[0] in ("-h", "--help", "help") else 2
    command, *rest = arguments
    try:
        importlib.import_module(f"gans.tools.{command.replace('-', '_')}").run(rest)
    except (ValueError, OSError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; train continues from the last checkpoint with --resume latest", file=sys.stderr)
        return 130
    return 0
