"""Random attention problems, of which each is a function of a seed and its number alone.

So two runs, and two checkouts, have the same ones, however many of them they run. Sizes are drawn evenly on a
logarithmic scale; a draw that plain PyTorch could not take in about a second is drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from .floors import step_fmas
from .shapes import Shape

BATCH, TOKENS, CHANNELS, HEADS = (1, 32), (16, 8192), (4, 128), (1, 16)
WINDOWS, KERNELS = (4, 32), (3, 13)

MOST_FMAS = 8e9  # of a gradient-penalty step
# Elements of naive's largest tensor, of which its double backward holds about ten: all scores, and of neighborhoods
# the gathered keys.
MOST_ELEMENTS = {"scores": 1 << 26, "keys": 1 << 25}


def random_shape(seed: int, number: int) -> Shape:
    """Problem ``number`` of a seed; its kind is ``KINDS[number % len(KINDS)]``, its name begins with that."""
    kinds = list(_DRAW)
    kind, random = kinds[number % len(kinds)], Random(f"{seed} {number}")
    while True:
        common = {
            "heads": _between(random, *HEADS), "head_dim": _channels(random), "batch": _between(random, *BATCH),
            "where": f"random problem {number} of seed {seed}",
        }  # fmt: skip
        shape = _DRAW[kind](random, name=f"{kind}-{number}", **common)
        if is_quick(shape):
            return shape


def is_quick(shape: Shape) -> bool:
    """Whether plain PyTorch takes about a second at most, and a few GiB."""
    scores = shape.batch * shape.heads * shape.queries * shape.keys_per_query
    keys = scores * shape.head_dim if shape.kind == "neighborhood" else 0
    return (
        step_fmas(shape, "double") <= MOST_FMAS and scores <= MOST_ELEMENTS["scores"] and keys <= MOST_ELEMENTS["keys"]
    )


def kind_of(shape: Shape) -> str:
    """The kind of a random problem: sequences with l2 scores are one of their own."""
    return "l2" if shape.score == "l2" else shape.kind


def _between(random: Random, least: int, most: int) -> int:
    return min(most, int(math.exp(random.uniform(math.log(least), math.log(most + 1)))))


def _channels(random: Random) -> int:
    """Mostly whole groups of four, as models have."""
    channels = _between(random, *CHANNELS)
    return channels if random.random() < 0.25 else (channels + 3) // 4 * 4


def _full(random: Random, **common) -> Shape:
    tokens = _between(random, *TOKENS)
    keys = _between(random, TOKENS[0], tokens) if random.random() < 0.25 else None
    return Shape(kind="full", size=(tokens,), keys=keys, **common)


def _l2(random: Random, **common) -> Shape:
    tokens, tied = _between(random, *TOKENS), random.random() < 0.5
    return Shape(kind="full", size=(tokens,), score="l2", tied=tied, **common)


def _grid(random: Random, **common) -> Shape:
    window = _between(random, *WINDOWS)
    windows = _between(random, 1, TOKENS[1] // window**2)
    down = _between(random, 1, windows)
    size = (window * down, window * (windows // down))
    return Shape(kind="grid", size=size, window=window, table=random.random() < 0.5, **common)


def _neighborhood(random: Random, **common) -> Shape:
    kernel = random.randint(*KERNELS)
    tokens = _between(random, max(TOKENS[0], kernel**2), TOKENS[1])
    height = max(kernel, min(tokens // kernel, round(math.sqrt(tokens) * 2 ** random.uniform(-0.7, 0.7))))
    size = (height, tokens // height)
    groups = 2 if common["heads"] % 2 == 0 and random.random() < 0.5 else 1
    dilations = tuple(_between(random, 1, min(size) // kernel) for _ in range(groups))
    table = random.random() < 0.5
    return Shape(kind="neighborhood", size=size, window=kernel, dilations=dilations, table=table, **common)


_DRAW: dict[str, Callable[..., Shape]] = {"full": _full, "l2": _l2, "grid": _grid, "neighborhood": _neighborhood}
KINDS = tuple(_DRAW)
