"""`python -m gans explore`: a page in the browser with a generator's images and where their pixels look."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from gans.commands.explorer import Explorer
from gans.commands.generators import Weights, check_backend, load_generator
from gans.common.distributed import choose_device


@dataclass(frozen=True)
class ExploreArguments:
    """Opens a page with the images of a generator: seeds, truncation, classes, the way between two seeds, styles of
    both, and by a click on a pixel where each head of each level looks. Ctrl-C ends it.

    Only this machine can reach the page. Needs `pip install '.[explore]'`.
    """

    checkpoint: Path
    """A run's folder (its newest checkpoint), a checkpoint, or a folder that convert or export has written."""
    port: int | None = None
    """Port of the page on 127.0.0.1; None is the first free one from 7860 on."""
    browser: bool = True
    """Whether to open a browser."""
    share: bool = False
    """Give the page a public address for a week as well, through a server of Gradio's."""
    weights: Weights = "generator_ema"
    """The averaged generator, or the one under training."""
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device."""
    backend: str | None = None
    """Attention backend of natten_ext for the images; the weights are computed by plain PyTorch operations."""

    def __post_init__(self) -> None:
        if self.port is not None and not 0 < self.port < 2**16:
            raise ValueError(f"port is {self.port}; it must be from 1 to 65535")


def run(arguments: list[str]) -> None:
    options = tyro.cli(ExploreArguments, args=arguments, prog="python -m gans explore")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would send statistics
    try:
        from gans.commands import explore_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("explore needs gradio, which is not installed: pip install '.[explore]'") from error
    generator = load_generator(options.checkpoint, choose_device(options.device), options.weights)
    check_backend(generator, options.backend)
    explorer = Explorer(generator, options.backend)
    page = explore_page.make_page(explorer, str(options.checkpoint))
    address = explore_page.serve(page, port=options.port, browser=options.browser, share=options.share)
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    page.block_thread()
