"""Every named attention shape, once, as data: what the four GANs and other published models really run."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from natten_ext.checks import windows_of, windows_of_grid
from natten_ext.geometry import AnyNeighborhood, Full, Grid

Each = int | tuple[int, ...]
"""One number for all map axes, or one for each."""


@dataclass(frozen=True)
class Shape:
    """One attention problem.

    ``kind`` is "full", "grid" or "neighborhood". ``size`` is ``(width,)``, ``(height, width)`` or ``(depth, height,
    width)`` for maps, ``(tokens,)`` for full attention; ``window`` is the grid's window or the neighborhood's kernel;
    ``dilations`` has one entry per equal group of heads; ``stride`` and ``causal`` are a neighborhood's, ``shift`` a
    grid's; ``keys`` is the number of keys of a cross attention. ``batch`` is the one that training uses (per device),
    which suite ``gpu`` runs.
    """

    name: str
    kind: str
    size: tuple[int, ...]
    heads: int
    head_dim: int
    where: str
    window: Each = 0
    dilations: tuple[Each, ...] = (1,)
    stride: Each = 1
    causal: bool | tuple[bool, ...] = False
    shift: Each = 0
    table: bool = False
    score: str = "dot"
    tied: bool = False
    keys: int | None = None
    batch: int = 1

    @property
    def queries(self) -> int:
        """Queries per image."""
        return math.prod(self.size)

    @property
    def is_map(self) -> bool:
        return self.kind != "full"

    @property
    def kernel(self) -> tuple[int, ...]:
        """The window on each map axis."""
        return self.window if isinstance(self.window, tuple) else (self.window,) * len(self.size)

    @property
    def neighborhood(self) -> AnyNeighborhood:
        """As natten_ext's operators get it."""
        if self.kind == "full":
            return Full()
        axes = len(self.size)
        if self.kind == "grid":
            return windows_of_grid(axes, self.window, self.shift)
        return windows_of(axes, self.heads, self.window, list(self.dilations), self.stride, self.causal)

    @property
    def general(self) -> bool:
        """Whether it has more than whole windows, or windows that slide, on two map axes."""
        found = self.neighborhood
        return (
            found.general or (self.is_map and len(self.size) != 2) or (isinstance(found, Grid) and found.cut(self.size))
        )

    @property
    def keys_per_query(self) -> int:
        """The most of any query."""
        return self.neighborhood.keys(self.key_tokens)

    @property
    def pairs(self) -> int:
        """Queries with each of their keys, of all heads of an image."""
        return _pairs(self)

    @property
    def key_tokens(self) -> int:
        """Keys per image."""
        return self.keys or self.queries

    @property
    def windows(self) -> int:
        """Windows per image of a grid, the cut ones too."""
        found = self.neighborhood
        axes = zip(self.size, found.window, found.first, strict=True)
        return math.prod(len(window_ranges(*axis)) for axis in axes)

    @property
    def query_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.size, self.heads, self.head_dim)

    @property
    def key_shape(self) -> tuple[int, ...]:
        return self.query_shape if self.keys is None else (self.batch, self.keys, self.heads, self.head_dim)

    @property
    def table_shape(self) -> tuple[int, ...]:
        return (self.heads, *(2 * extent - 1 for extent in self.kernel))

    @property
    def head_groups(self) -> list[tuple[slice, Each]]:
        """The heads of each dilation, with the dilation."""
        per_group = self.heads // len(self.dilations)
        return [(slice(i * per_group, (i + 1) * per_group), d) for i, d in enumerate(self.dilations)]

    def single_head(self, head: int) -> Shape:
        """The same problem for one head."""
        dilation = self.dilations[head * len(self.dilations) // self.heads]
        return replace(self, heads=1, dilations=(dilation,))

    def tiny(self) -> Shape:
        """A very small problem of the same kind, to warm up code paths without large buffers."""
        if self.kind == "full":
            return replace(self, batch=1, size=(16,), keys=self.keys and 16)
        return replace(self, batch=1, size=self.kernel, dilations=(1,))

    def describe(self) -> str:
        """Batch, map or tokens, heads and head_dim in one short string."""
        size = "x".join(map(str, self.size)) + (f" on {self.keys}" if self.keys else "")
        return f"{self.batch},{size},{self.heads},{self.head_dim}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Shape:
        return Shape(**{name: _tuples(value) for name, value in data.items()})


def window_ranges(length: int, window: int, first: int) -> list[range]:
    """The windows of an axis, which begin at ``first`` and every ``window`` from there; those at its ends are cut."""
    bounds = [0, *range(first or window, length, window), length]
    return [range(start, end) for start, end in itertools.pairwise(bounds)]


@functools.cache  # counts the keys of each position, and tables ask for it again and again
def _pairs(shape: Shape) -> int:
    found = shape.neighborhood
    if isinstance(found, Full):
        return shape.heads * shape.queries * shape.key_tokens
    if isinstance(found, Grid):
        return shape.heads * math.prod(
            sum(len(keys) ** 2 for keys in window_ranges(*axis))
            for axis in zip(shape.size, found.window, found.first, strict=True)
        )
    return sum(
        (last - first)
        * math.prod(
            sum(len(window.keys(i, n)) for i in range(n))
            for n, window in zip(shape.size, found.windows[first], strict=True)
        )
        for first, last in found.head_groups()
    )


def _tuples(value: Any) -> Any:
    """The tuples that JSON has made lists of."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _grid(name, side, heads, head_dim, window, batch, where, table=True):
    return Shape(name, "grid", (side, side), heads, head_dim, where, window=window, table=table, batch=batch)


def _neighborhood(side, heads, head_dim, dilations, batch):
    where = f"StyleNAT, {side} px stage"
    return Shape(
        f"nat-{side}", "neighborhood", (side, side), heads, head_dim, where,
        window=7, dilations=dilations, table=True, batch=batch,
    )  # fmt: skip


def _full(name, tokens, heads, head_dim, batch, where, **choices):
    return Shape(name, "full", (tokens,), heads, head_dim, where, batch=batch, **choices)


_CIFAR_G, _STL_G = "TransGAN generator, CIFAR-10", "TransGAN generator, STL-10"
_CHURCH_G = "TransGAN generator, 256 px"
_CIFAR_D, _CHURCH_D = "TransGAN discriminator, CIFAR-10", "TransGAN discriminator, 256 px"
_CELEBA_D = "TransGAN discriminator, CelebA-HQ"
_LAST_D = "last block of TransGAN's discriminators"
_CROSS = "cross attention onto the latent tokens, TransGAN generator, CelebA-HQ"
_PIXEL = "pixel attention of larger discriminators"

_ALL = (
    # Grid and full attention with a relative position table
    _grid("cifar-g1", 8, 4, 256, 8, 128, _CIFAR_G),
    _grid("cifar-g2", 16, 4, 64, 16, 128, _CIFAR_G),
    _grid("cifar-g3", 32, 4, 16, 32, 128, _CIFAR_G),
    _grid("stl-g1", 12, 4, 256, 12, 64, _STL_G),
    _grid("stl-g2", 24, 4, 64, 24, 64, _STL_G),
    _grid("stl-g3", 48, 4, 16, 48, 64, _STL_G),
    _grid("church-g2", 16, 4, 256, 16, 16, _CHURCH_G),
    _grid("church-g3", 32, 4, 256, 32, 16, _CHURCH_G),
    _grid("church-g4", 64, 4, 64, 16, 16, _CHURCH_G),
    _grid("church-g5", 128, 4, 16, 16, 16, _CHURCH_G),
    _grid("church-g6", 256, 4, 4, 16, 16, _CHURCH_G),
    _grid("cifar-d1", 16, 4, 72, 16, 64, _CIFAR_D),
    _grid("cifar-d2", 8, 4, 96, 8, 64, _CIFAR_D),
    _grid("church-d1", 64, 4, 72, 16, 16, _CHURCH_D),
    _grid("church-d1-full", 64, 4, 72, 64, 16, _CHURCH_D + ", the block over the whole map"),
    _grid("church-d2", 32, 4, 84, 32, 16, _CHURCH_D),
    _grid("church-d3", 16, 4, 96, 16, 16, _CHURCH_D),
    _grid("celeba-d1", 128, 4, 24, 4, 16, _CELEBA_D, table=False),
    _grid("celeba-d2", 64, 4, 48, 4, 16, _CELEBA_D, table=False),
    # Sequences without a table
    _full("seq-65", 65, 4, 96, 64, _LAST_D + ", CIFAR-10"),
    _full("seq-145", 145, 4, 96, 64, _LAST_D + ", STL-10"),
    _full("seq-257", 257, 4, 96, 16, _LAST_D + ", 256 px"),
    _full("seq-1025", 1025, 4, 96, 16, _LAST_D + ", CelebA-HQ"),
    _full("cross-256", 256, 4, 256, 16, _CROSS, keys=64),
    _full("cross-1024", 1024, 4, 256, 16, _CROSS, keys=64),
    _full("cross-4096", 4096, 4, 64, 16, _CROSS, keys=64),
    _full("cross-16384", 16384, 4, 16, 16, _CROSS, keys=64),
    _full("cross-65536", 65536, 4, 4, 16, _CROSS, keys=64),
    _full("full-1k", 1024, 8, 64, 8, "plain full attention, PyTorch's home ground"),
    # Dilated neighborhoods with a table, two groups of heads
    _neighborhood(8, 16, 32, (1,), 8),
    _neighborhood(16, 16, 32, (1, 2), 8),
    _neighborhood(32, 16, 32, (1, 4), 8),
    _neighborhood(64, 16, 32, (1, 8), 8),
    _neighborhood(128, 8, 32, (1, 16), 8),
    _neighborhood(256, 4, 32, (1, 32), 8),
    _neighborhood(512, 4, 16, (1, 64), 4),
    _neighborhood(1024, 4, 8, (1, 128), 2),
    # L2-distance attention
    _full("vitgan-d", 65, 6, 64, 128, "ViTGAN discriminator, 32 and 64 px", score="l2", tied=True),
    _full("l2-1k", 1024, 8, 64, 8, _PIXEL, score="l2"),
    _full("l2-4k", 4096, 8, 64, 2, _PIXEL, score="l2"),
    _full("l2-gat", 257, 16, 72, 32, "recent transformer GANs", score="l2"),
)

SHAPES: dict[str, Shape] = {shape.name: shape for shape in _ALL}
"""Of the GANs."""


def _map(name, size, heads, head_dim, window, batch, where, **choices):
    return Shape(name, "neighborhood", size, heads, head_dim, where, window=window, batch=batch, **choices)


def _shifted(name, size, heads, head_dim, window, shift, batch, where):
    return Shape(
        name, "grid", size, heads, head_dim, where, window=window, shift=shift, table=True, batch=batch
    )  # fmt: skip


_GNA = ", latent map and windows of Generalized Neighborhood Attention (arXiv 2504.16922)"

_GENERAL = (
    # Lines
    _map("allin1", (8192,), 2, 12, 5, 4, "All-In-One music analysis (arXiv 2307.16425), 82 s, four sources",
         dilations=(256,), table=True),
    _map("mimi", (1500,), 8, 64, 250, 1, "Mimi audio codec of Moshi (arXiv 2410.00037), two minutes", causal=True),
    _map("gpt-oss", (4096,), 64, 64, 128, 1, "gpt-oss (arXiv 2508.10925), every other layer", causal=True),
    # Images
    _map("flux-gna", (256, 256), 24, 128, 80, 1, "FLUX.1-dev at 4096 px" + _GNA, stride=16),
    _shifted("swin-t1", (56, 56), 3, 32, 7, 3, 128, "Swin-T, first stage, 224 px (arXiv 2103.14030)"),
    # Videos
    _map("hunyuan-na", (30, 48, 80), 24, 128, (18, 24, 24), 1, "HunyuanVideo" + _GNA),
    _map("hunyuan-gna", (30, 48, 80), 24, 128, (18, 24, 24), 1, "HunyuanVideo" + _GNA, stride=(16, 8, 8)),
    _shifted("video-swin-t1", (16, 56, 56), 3, 32, (8, 7, 7), (4, 3, 3), 8,
             "Video Swin-T, first stage, 32 frames of 224 px (arXiv 2106.13230)"),
)  # fmt: skip

GENERAL: dict[str, Shape] = {shape.name: shape for shape in _GENERAL}
"""Of other models: one and three map axes, strides, causal and shifted windows."""

NAMED = SHAPES | GENERAL
