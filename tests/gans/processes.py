"""Processes of the command line, forked from one that has imported what they need, which takes each by itself ten
seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "sklearn.datasets",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "gans.commands.train",
        "gans.evaluation.plots",
        "gans.evaluation.report",
    ]
)


def _gans(arguments: tuple[str, ...], errors: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    from gans.commands.cli import main

    sys.exit(main(list(arguments)))


@contextmanager
def gans(*arguments: str, errors: Path, **environment: str) -> Iterator[BaseProcess]:
    """`python -m gans` as a process of a group of its own, which ends with the context; `errors` gets its stderr."""
    process = FORKS.Process(target=_gans, args=(arguments, errors, environment))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@contextmanager
def several(count: int, *arguments: str, errors: Path) -> Iterator[list[BaseProcess]]:
    """As `torchrun` starts them, on this machine; each has a file in the folder `errors`."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                gans(*arguments, errors=errors / str(rank), RANK=str(rank), LOCAL_RANK=str(rank), **shared)
            )
            for rank in range(count)
        ]
