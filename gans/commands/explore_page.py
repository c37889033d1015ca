"""The page of `python -m gans explore`, made with Gradio."""

from __future__ import annotations

import random
from typing import Any, get_args

import gradio as gr
from PIL import Image
from torch import Tensor

from gans.commands.explorer import Explorer, Mode, View
from gans.commands.generators import Space
from gans.data.images import GAP, data_uri, enlarge, grid, to_pil
from gans.evaluation.heat_maps import framed, table

SIDE = 512
"""Pixels along a side of the sample on the page, at the least where it is smaller."""
STRIP_SIDE = 64
"""The same of the images that it lies between."""

CSS = """
.sample img, .between, table.looks img { image-rendering: pixelated; }
.sample img { cursor: crosshair; }
.between { max-width: 100%; }
table.looks { display: block; overflow-x: auto; }
table.looks td, table.looks th { padding: .2rem .4rem; text-align: center; font-weight: normal; }
table.looks img { width: 8rem; max-width: none; display: inline; }
"""

ABOUT_MAPS = """A row for each map size, a picture for each head. The frame is the query, the part of the map that the
pixel lies in. Each picture is scaled by its largest weight, which stands below it; where it shows the image alone, the
weight is 0 or close to it."""
NO_ATTENTION = "This generator has no attention that can be drawn."

HOST = "127.0.0.1"
"""This machine alone."""

FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
"""Fonts of the system: the library's own come from a server of Google's."""


def make_page(explorer: Explorer, title: str) -> Any:
    """The page, a `gradio.Blocks`; `show` is its function for everything, also for programs (`api_name`)."""
    size = explorer.config.image_size
    scale, small = (max(1, side // size) for side in (SIDE, STRIP_SIDE))

    def show(*values: Any) -> tuple[Image.Image, str, str]:
        """The sample with a frame around the pixel, HTML of what it lies between, and of the heat maps."""
        *settings, row, column, every_module = values
        try:
            view = to_view(*settings)
            pixel = whole("row", row), whole("column", column)
            image = to_pil(explorer.image(view))
            looks = explorer.looks(view, pixel, every_module=every_module)
            between = "" if view.mode == "one seed" else strip(explorer.between(view), small)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return framed(enlarge(image, scale), pixel, scale), between, table(looks, image)

    def clicked(event: gr.SelectData) -> tuple[int, int]:
        x, y = event.index
        return min(y // scale, size - 1), min(x // scale, size - 1)

    modes = get_args(Mode) if explorer.mapped else get_args(Mode)[:2]
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"### {title}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                    other = gr.Button("Another seed")
                class_ = gr.Dropdown(
                    [("by the seed", ""), *((name, name) for name in explorer.classes)],
                    value="",
                    label="Class",
                    visible=bool(explorer.classes),
                )
                truncation = gr.Slider(0, 1, 1, step=0.05, label="Truncation", visible=explorer.mapped)
                mode = gr.Radio(list(modes), value=modes[0], label="Show")
                with gr.Group(visible=False) as both:
                    second = gr.Number(1, label="Second seed", precision=0, minimum=0)
                    position = gr.Slider(0, 1, 0.5, step=0.01, label="Way to the second seed", visible=False)
                    space = gr.Radio(list(get_args(Space)), value="z", label="Way in", visible=False)
                    blocks = gr.CheckboxGroup(
                        explorer.blocks, label="Blocks with the second seed's style, coarse ones first", visible=False
                    )
            with gr.Column(scale=3, min_width=320):
                gr.Markdown("Click a pixel to see where it looks." if explorer.attends else NO_ATTENTION)
                sample = gr.Image(
                    show_label=False,
                    format="png",
                    interactive=False,
                    elem_classes="sample",
                    buttons=[],
                    alt_text="sample",
                )
                between = gr.HTML(apply_default_css=False)
        with gr.Row(visible=explorer.attends):
            row = gr.Number(size // 2, label="Row of the pixel", precision=0, minimum=0, maximum=size - 1)
            column = gr.Number(size // 2, label="Column of the pixel", precision=0, minimum=0, maximum=size - 1)
            every_module = gr.Checkbox(False, label="Every block, not only the last of each size")
        gr.Markdown(ABOUT_MAPS, visible=explorer.attends)
        maps = gr.HTML(apply_default_css=False)

        settings = [seed, truncation, class_, mode, second, position, space, blocks]
        wiring = {"inputs": [*settings, row, column, every_module], "outputs": [sample, between, maps]}
        wiring |= {"show_progress": "minimal", "trigger_mode": "always_last"}
        edits = [control.input for control in wiring["inputs"]]
        gr.on([page.load, *edits], show, **wiring, api_name="show")
        sample.select(clicked, None, [row, column], api_visibility="private").then(
            show, **wiring, api_visibility="private"
        )
        other.click(lambda: random.randrange(2**31), None, seed, api_visibility="private").then(
            show, **wiring, api_visibility="private"
        )
        mode.input(
            lambda chosen: (
                gr.Group(visible=chosen != "one seed"),
                gr.Slider(visible=chosen == "interpolate"),
                gr.Radio(visible=chosen == "interpolate" and explorer.mapped),
                gr.CheckboxGroup(visible=chosen == "mix styles"),
            ),
            mode,
            [both, position, space, blocks],
            api_visibility="private",
        )
    return page


def to_view(
    seed: int, truncation: float, class_: str, mode: Mode, second: int, position: float, space: Space, blocks: list[str]
) -> View:
    """The settings as the page has them: no class is "", blocks are named as `Explorer.blocks`."""
    numbers = tuple(int(block.partition(":")[0]) for block in blocks)
    seeds = {"seed": whole("seed", seed), "second": whole("second seed", second)}
    return View(
        **seeds, truncation=truncation, name=class_ or None, mode=mode, position=position, space=space, blocks=numbers
    )


def whole(name: str, value: int | None) -> int:
    """What a field for a number holds; ValueError if it is empty or no seed could be as large."""
    if value is None or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {value}; it must be a whole number from 0 on")
    return value


def strip(images: Tensor, scale: int) -> str:
    """HTML of images side by side."""
    return f'<img class="between" src="{data_uri(enlarge(grid(images, len(images), GAP), scale))}" alt="between">'


def serve(page: gr.Blocks, *, port: int | None, browser: bool = False, share: bool = False) -> str:
    """Serves the page to this machine in a thread of its own; returns its address. OSError if the port is taken."""
    font, font_mono = FONTS
    try:
        _, address, public = page.launch(
            server_name=HOST,
            server_port=port,
            inbrowser=browser,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(font=font, font_mono=font_mono),
            css=CSS,
        )
    except OSError as error:
        if port is None or "port" not in str(error):
            raise
        raise OSError(f"port {port} of {HOST} is taken, or not for everybody; give another, or none") from error
    return public or address
