"""What `python -m gans explore` shows, without the page: the sample of some settings, what is around it, where its
pixels look.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, repeat
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gans.commands.generators import (
    Space,
    attention_backend,
    has_mapping,
    labels_of,
    latents,
    render,
    to_codes,
)
from gans.commands.interpolate import lerp, slerp
from gans.commands.style_mixing import mixed_styles
from gans.evaluation.attention_maps import AttentionMaps, Pixel, Recorded, last_of_each_size, looks, recorded

Mode = Literal["one seed", "interpolate", "mix styles"]

WAY = 9
"""Images of the way from the first seed to the second, both included."""


@dataclass(frozen=True)
class View:
    """The settings of one image."""

    seed: int = 0
    truncation: float = 1.0
    """As `to_codes` has it."""
    name: str | None = None
    """The class, by name or number; None goes by the seed."""
    mode: Mode = "one seed"
    """What the second seed is for."""
    second: int = 1
    position: float = 0.5
    """Interpolation: how far from the first seed to the second, from 0 to 1."""
    space: Space = "z"
    """Interpolation: z, on the great circle, or w, on the line."""
    blocks: tuple[int, ...] = ()
    """Style mixing: the blocks that follow the second seed."""


class Explorer:
    """A generator and what was last made with it, for several threads.

    All images have the noise of the first seed, and in z its class. `backend` is an attention backend of natten_ext, or
    None for its choice.
    """

    def __init__(self, generator: nn.Module, backend: str | None = None) -> None:
        self.generator, self.backend = generator, backend
        self.config: Any = generator.config
        self.mapped = has_mapping(generator)
        count = getattr(self.config, "classes", 0)
        self.classes: list[str] = list(getattr(generator, "class_names", []) or map(str, range(count)))
        self._lock = threading.Lock()  # hooks and the noise's generators are one for the process
        self._last_sample = lru_cache(maxsize=1)(self._make_sample)
        self._last_between = lru_cache(maxsize=1)(self._make_between)
        modules = self._sample(View())[1]
        self.attends = bool(modules)
        # Of the w that there may be: numbers, and the sizes of the maps of those that attend.
        self.blocks: list[str] = []
        if self.mapped:
            sizes = (f": {entry.extents[0]}x{entry.extents[1]}" for entry in modules)
            numbers = range(self.config.blocks)
            self.blocks = [f"{number}{size}" for number, size in zip(numbers, chain(sizes, repeat("")), strict=False)]

    def image(self, view: View) -> Tensor:
        """The image `(C, H, W)` in [-1, 1]."""
        return self._sample(view)[0]

    def between(self, view: View) -> Tensor:
        """What the image lies between, `(N, C, H, W)`: the whole way to the second seed, or for styles both seeds."""
        with self._lock:
            return self._last_between(replace(view, position=0.0, blocks=()))

    def looks(self, view: View, pixel: Pixel, *, every_module: bool = False) -> list[AttentionMaps]:
        """Where the pixel (row, column) of the image looks: in the last module on each size of map, or in every one.

        The weights are those of the generator's own queries and keys. Empty for a generator without attention.
        """
        maps = looks(self._sample(view)[1], [pixel], self.config.image_size)
        return maps if every_module else last_of_each_size(maps)

    def _sample(self, view: View) -> tuple[Tensor, list[Recorded]]:
        with self._lock:
            return self._last_sample(view)

    def _make_between(self, view: View) -> Tensor:
        if view.mode == "mix styles":
            return self._render(view, *self._codes(replace(view, space="w"), (0.0, 1.0)))
        return self._render(view, *self._codes(view, [i / (WAY - 1) for i in range(WAY)]))

    def _make_sample(self, view: View) -> tuple[Tensor, list[Recorded]]:
        if view.mode == "mix styles":
            first, second = self._codes(replace(view, space="w"), (0.0, 1.0))[0].split(1)
            codes, space = mixed_styles(first, second, view.blocks, self.config.blocks)[1, 1:], "w"
        else:
            codes, space = self._codes(view, [view.position if view.mode == "interpolate" else 0.0])
        with recorded(self.generator) as entries:
            (image,) = self._render(view, codes, space)
        return image, entries

    def _codes(self, view: View, times: Sequence[float]) -> tuple[Tensor, Space]:
        """The codes of these times between the seeds, and whether they are z or w."""
        seeds = [view.seed, view.second]
        z = latents(seeds, self.config.latent_dim)
        device = next(self.generator.parameters()).device
        if view.space == "w":
            labels = labels_of(self.generator, seeds, view.name)
            w = to_codes(self.generator, z.to(device), labels, space="w", truncation=view.truncation)
            return lerp(w[0], w[1], torch.tensor(times)), "w"
        labels = labels_of(self.generator, [view.seed] * len(times), view.name)
        way = slerp(z[0], z[1], torch.tensor(times)).to(device)
        return to_codes(self.generator, way, labels, truncation=view.truncation), "z" if view.truncation == 1 else "w"

    def _render(self, view: View, codes: Tensor, space: Space) -> Tensor:
        same = [view.seed] * len(codes)
        with attention_backend(self.backend):
            return torch.cat(list(render(self.generator, same, codes=codes, space=space, name=view.name)))
