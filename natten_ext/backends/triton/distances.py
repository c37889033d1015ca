"""Sums over the channels that the score l2 needs for every query and every key.

-|q-k|^2 / 2 is q.k - |q|^2 / 2 - |k|^2 / 2, and what it adds to X in the double backward is -gQ.Q - gK.K. Softmax
removes the terms of queries, but without them scores would be large, and so would be their rounding errors. The sums
have a kernel of their own because every pass must have the same bits, and each layout of a tile sums in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .geometry import SIZES, empty, own_tile
from .launch import Launch
from .places import own_place
from .problem import KEY, QUERY
from .tiles import Rows, Terms, load_rows, row_sums, store_column


@triton.jit(do_not_specialize=SIZES)
def row_terms_kernel(
    first, second, terms, members,
    scale, heads, tiles, depth, height, width, window_z, window_y, window_x, table_planes, table_rows, table_columns,
    FACTOR: tl.constexpr, KEYS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """FACTOR * first * second, summed over the channels."""
    OWN: tl.constexpr = S.own
    lattice, box = own_tile(heads, tiles, members, depth, height, width, window_z, window_y, window_x, KEYS, S)
    if empty(box):
        return
    place = own_place(box, S)
    factors = load_rows(first, lattice, place, KEYS, S), load_rows(second, lattice, place, KEYS, S)
    sums = row_sums(factors[0], factors[1], OWN, S)
    store_column(terms, lattice, place, sums * FACTOR, KEYS, S)


def _terms(launch: Launch, first: Rows | None, second: Rows, factor: float, owner: str) -> torch.Tensor:
    shape = launch.row_shape if owner == QUERY else launch.key_shape
    if first is None:
        return launch.empty(shape, zero=True)
    terms = launch.empty(shape)
    launch.run(row_terms_kernel, "forward", owner, first, second, terms, FACTOR=factor, KEYS=owner == KEY)
    return terms


def score_terms(launch: Launch) -> Terms | None:
    """-|q|^2 / 2 and -|k|^2 / 2; None for the score ``dot``."""
    return x_terms(launch, launch.query, launch.key, 0.5)


def x_terms(launch: Launch, cot_query: Rows | None, cot_key: Rows | None, factor: float = 1.0) -> Terms | None:
    """-gQ.Q and -gK.K, zero without cotangents; None for the score ``dot``."""
    if not launch.l2:
        return None
    return Terms(
        _terms(launch, cot_query, launch.query, -factor, QUERY), _terms(launch, cot_key, launch.key, -factor, KEY)
    )
