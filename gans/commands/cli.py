"""Command line: `gans COMMAND` or `python -m gans COMMAND`.

Each command is a module of `gans.commands`, imported when it is used: torch alone takes seconds, which help and
mistyped commands do without.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import runpy
import select
import sys
from pathlib import Path

from gans.common.unset import names_nothing

COMMANDS = {
    "demo": "train a small TransGAN on scanned digits and show it:  demo --out DIR",
    "train": "train a recipe:  train --preset cifar10 --data FOLDER|ZIP --out DIR [any override]",
    "presets": "list the recipes; with a name, print all of its settings",
    "data": "check images, or pack them:  data --data FOLDER|ZIP [--convert FILE.zip --size N]",
    "cost": "time and memory of a step, fused and naive:  cost --preset cifar10 --batch 4",
    "figures": "draw a run's samples and curves:  figures --run DIR --out DIR",
    "sample": "images from a checkpoint:  sample --checkpoint DIR --seeds 0-63 --out FILE.png",
    "interpolate": "an animation from seed to seed:  interpolate --checkpoint DIR --seeds 0-5 --out FILE.gif",
    "style-mixing": "styles of two seeds in one image:  style-mixing --checkpoint DIR --rows 0-3 --columns 4-9 --out F",
    "attention-map": "where attention looks:  attention-map --checkpoint DIR --seed 0 --out FILE.png",
    "explore": "a page in the browser for all of these:  explore --checkpoint DIR",
    "project": "the latent of an image:  project --checkpoint DIR --image FILE --out DIR",
    "convert": "a published checkpoint to ours:  convert --checkpoint FILE.pth --preset cifar10 --out DIR",
    "export": "a generator for the Hugging Face hub:  export --checkpoint DIR --out DIR",
    "throughput": "images a second of a generator:  throughput --checkpoint DIR",
    "evaluate": "distances to real images:  evaluate --reference FOLDER|ZIP --checkpoint DIR --networks lite1",
    "train-judge": "a network to measure over:  train-judge --data FOLDER|ZIP --out FILE.safetensors",
}
"""Each command with its line of help; the module's name has underscores for hyphens."""

READER_GONE = 141
"""Exit status where the program that our output went to has ended, as of a process that SIGPIPE ends."""


def usage() -> str:
    """What `python -m gans` prints without a command."""
    lines = [f"  {name:<14}{line}" for name, line in COMMANDS.items()]
    head = "usage: python -m gans COMMAND [options]\n       python -m gans --version\n\ncommands:"
    return "\n".join([head, *lines, "\nEach command explains its options with --help."])


def version() -> str:
    """natten_ext's version, read without importing natten_ext, which would import torch."""
    spec = importlib.util.find_spec("natten_ext")
    assert spec and spec.origin
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))["__version__"]


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status. Errors that a user can mend are one line on stderr."""
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            print(end="", flush=True)  # at the interpreter's end it would be too late to see that nobody reads
    except BrokenPipeError as error:
        if _silence_pipes_without_reader():
            return READER_GONE
        return _fail(error)
    except OSError as error:
        return _fail(error)
    except KeyboardInterrupt as interrupt:  # of `train`, a gans.training.interrupt.Interrupted
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return getattr(interrupt, "status", 130)


def _run(arguments: list[str]) -> int:
    command, *rest = arguments or [""]
    if command in ("", "-h", "--help", "help"):
        print(usage())
        return 0 if command else 2
    if command in ("-V", "--version"):
        print(f"natten_ext {version()}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command.lower(), COMMANDS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}"
        return _fail(f"no command is called {command!r}; {hint}", status=2)
    if (name := _empty(rest)) is not None:
        return _fail(names_nothing(name))
    # OpenMP threads that spin while they wait make small layers several times slower as soon as anything else runs on
    # the machine (six times, measured with two threads on two busy cores). Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from gans.training.steps import NonFiniteError
        from natten_ext.backends.choice import check_environment

        module = importlib.import_module(f"gans.commands.{command.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("gans", "natten_ext"):
            raise
        return _fail(f"{command} needs {error.name}, which is not installed; pip install '.[gans]' brings all it needs")
    try:
        check_environment()
        return module.run(rest) or 0  # the demo's status says whether it succeeded
    except (ValueError, NonFiniteError) as error:
        return _fail(error)


def _empty(arguments: list[str]) -> str | None:
    """The option that is given '', which no option of any command takes; None if there is none."""
    name = "argument"
    for argument in arguments:
        if argument.startswith("--"):
            name, given, value = argument.removeprefix("--").replace("-", "_").partition("=")
            if given and not value:
                return name
        elif not argument:
            return name
    return None


def _fail(problem: object, status: int = 1) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return status


def _silence_pipes_without_reader() -> bool:
    """Sends output whose reader has gone to nowhere, also what is still in buffers; whether there is any such."""
    poll = select.poll()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        poll.register(stream.fileno(), 0)
    gone = [number for number, event in poll.poll(0) if event & select.POLLERR]
    for number in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(gone)
