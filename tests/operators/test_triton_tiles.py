"""How the triton backend cuts problems into tiles: nothing is missed, and the share of useful work is what it says."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operators import oracle

pytest.importorskip("triton")

from benchmarks.kernels import triton_work
from natten_ext.backends.triton import configs
from natten_ext.backends.triton.launch import chunks_of
from natten_ext.backends.triton.problem import KEY, QUERY, Axis, _problem_of, displaced_pairs, displacements, tiling
from natten_ext.checks import windows_of
from natten_ext.geometry import FULL, GRID, NEIGHBORHOOD, Full, Grid

quick = settings(max_examples=60, deadline=None, derandomize=True)


def axis_pairs(axis: Axis) -> set[tuple[int, int]]:
    """(query, key) for every query of an axis and every key that it sees, by the oracle."""
    if axis.kind == FULL:
        return set(product(range(axis.queries), range(axis.keys)))
    if axis.kind == GRID:
        return {(q, k) for q, k in product(range(axis.queries), repeat=2) if q // axis.window == k // axis.window}
    rule = axis.queries, axis.window, 1, axis.stride, axis.causal
    return {(q, k) for q in range(axis.queries) for k in oracle.axis_neighbors(q, *rule)}


axes = st.one_of(
    st.builds(lambda q, k: Axis(FULL, q, k, k), st.integers(1, 40), st.integers(1, 40)),
    st.builds(lambda w, n: Axis(GRID, w * n, w * n, w), st.integers(1, 9), st.integers(1, 5)),
    st.builds(
        lambda w, s, n, causal: Axis(NEIGHBORHOOD, w + n, w + n, w, min(s, w), causal),
        st.integers(1, 9),
        st.integers(1, 9),
        st.integers(0, 30),
        st.booleans(),
    ),
)
powers = st.sampled_from([1, 2, 4, 8, 16])


@given(axes, powers)
@quick
def test_reach_is_exactly_what_is_seen(axis, own):
    """The range of keys of a tile of queries, and the range of queries of a tile of keys."""
    pairs = axis_pairs(axis)
    for first in range(0, axis.queries, own):
        seen = [k for q, k in pairs if first <= q < first + own]
        assert axis.keys_of(first, min(first + own, axis.queries) - 1) == (min(seen), max(seen) + 1)
    for first in range(0, axis.keys, own):
        seen = [q for q, k in pairs if first <= k < first + own]
        assert axis.queries_of(first, min(first + own, axis.keys) - 1) == (min(seen), max(seen) + 1)


PROBLEMS = [
    _problem_of(tuple(code), shape, keys)
    for code, shape, keys in (
        (Full().encode(), (2, 65, 3, 16), 65),
        (Full().encode(), (1, 7, 2, 16), 130),
        (Grid((4, 4)).encode(), (1, 8, 16, 2, 24), 8),
        (Grid((3, 5)).encode(), (1, 6, 10, 2, 24), 6),
        (Grid((12, 12)).encode(), (1, 24, 12, 1, 24), 24),
        (Grid((8, 1)).encode(), (1, 16, 6, 1, 24), 16),
        (windows_of(2, 2, 7, [1, 2]).encode(), (1, 16, 19, 2, 32), 16),
        (windows_of(2, 2, [3, (5, 2)], [(1, 4), (2, 3)]).encode(), (1, 13, 17, 2, 32), 13),
        (windows_of(2, 1, (6, 4), 1).encode(), (1, 6, 33, 1, 32), 6),
        (windows_of(1, 2, 9, [1, 3]).encode(), (1, 130, 2, 32), 130),
        (windows_of(2, 2, [7, 5], 1, [(3, 1), 5], (False, True)).encode(), (1, 17, 40, 2, 32), 17),
        (Grid((2, 3, 4)).encode(), (1, 6, 6, 8, 2, 24), 6),
        (windows_of(3, 2, [3, (2, 5, 1)], [1, (2, 1, 3)]).encode(), (1, 5, 9, 12, 2, 32), 5),
        (windows_of(3, 1, (4, 3, 3), 1, (2, 1, 3), (True, False, False)).encode(), (1, 9, 4, 11, 1, 32), 9),
    )
]


@pytest.mark.parametrize("owner", [QUERY, KEY])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: str(problem.window))
@pytest.mark.parametrize("sizes", [(64, 32), (16, 16)], ids=str)
def test_tiles_hold_every_pair(problem, owner, sizes):
    """Pairs of all lattices are the problem's, and no more than the tiles compute."""
    tiles = tiling(problem, *sizes, owner)
    pairs = sum(n * prod(len(axis_pairs(axis)) for axis in axes) for n, axes in problem.lattices(tiles.packed))
    assert pairs == problem.pairs()
    assert pairs <= tiles.issued
    for side, size in ((tiles.own, sizes[0]), (tiles.block, sizes[1])):
        assert prod(side) <= size and all(extent & (extent - 1) == 0 for extent in side)
    assert prod(tiles.own) >= 16
    assert tiles.tiles * prod(tiles.own) * problem.heads >= problem.heads * (
        problem.queries if owner == QUERY else problem.keys
    )


@pytest.mark.parametrize("problem", PROBLEMS[2:], ids=lambda problem: str(problem.window))
@pytest.mark.parametrize("sizes", [(64, 32), (16, 16)], ids=str)
def test_displacements_hold_every_pair(problem, sizes):
    """The table's gradient meets every pair, in one visit of a tile at one displacement."""
    tiles = tiling(problem, *sizes, QUERY)
    places = displacements(problem, tiles)
    for head in range(problem.heads):
        of_head = [place for place in places if place.head == head]
        on_axes = [set(of_axis) for of_axis in zip(*(place.axes for place in of_head), strict=True)]
        assert len(of_head) == prod(map(len, on_axes))
        axes = problem.axes(head, tiles.packed)
        for lattice, own, block, displaced in zip(axes, tiles.own, tiles.block, on_axes, strict=True):
            for query, key in set().union(*map(axis_pairs, lattice)):
                met = [
                    place
                    for place in displaced
                    if place.first <= query // own < place.first + place.tiles
                    and 0 <= key - query // own * own - place.start < block
                ]
                assert len(met) == 1
    assert problem.pairs() <= displaced_pairs(problem, tiles)


def test_displacements_are_few():
    """Tiles of 8 x 8 see 14 x 14 keys of a window of 7 x 7: two blocks on each axis, one where the map is one tile."""
    problem = _problem_of(tuple(windows_of(2, 2, 7, [1, 8]).encode()), (2, 64, 64, 2, 32), 64)
    tiles = tiling(problem, 64, 64, QUERY)
    assert tiles.own == tiles.block == (1, 8, 8)
    visits = {}
    for place in displacements(problem, tiles):
        visits.setdefault(place.head, []).append(place.visits)
    assert sum(visits[0]) <= (7 * 2 + 1 + 1) ** 2 * 4 and visits[1] == [64]


def test_tiles_suit_the_map():
    """A line's are 1 x 64, a video's are compact on all axes, and a flat one's are those of its images."""
    line = _problem_of(tuple(windows_of(1, 1, 127, 1).encode()), (1, 4096, 1, 32), 4096)
    assert tiling(line, 64, 64, QUERY).own == (1, 1, 64)
    video = _problem_of(tuple(windows_of(3, 1, 5, 1).encode()), (1, 16, 32, 32, 1, 32), 16)
    assert tiling(video, 64, 64, QUERY).own == (4, 4, 4)
    flat = _problem_of(tuple(windows_of(3, 1, (1, 7, 7), 1).encode()), (1, 16, 32, 32, 1, 32), 16)
    assert tiling(flat, 64, 64, QUERY).own == (1, 8, 8)


def test_only_what_a_problem_has_is_compiled_in():
    """A third axis, and strides and causal windows on the axes where a head has them."""
    flat = _problem_of(tuple(windows_of(2, 2, 7, [1, 2]).encode()), (1, 16, 19, 2, 32), 16)
    assert (flat.deep, flat.strided, flat.causal) == (False, (False,) * 3, (False,) * 3)
    still = _problem_of(tuple(windows_of(3, 2, (1, 7, 7), 1).encode()), (2, 1, 16, 19, 2, 32), 1)
    assert (still.deep, still.strided, still.causal) == (False, (False,) * 3, (False,) * 3)
    video = windows_of(3, 2, 5, 1, [1, (1, 1, 2)], (True, False, False))
    video = _problem_of(tuple(video.encode()), (1, 6, 16, 19, 2, 32), 6)
    assert (video.deep, video.strided, video.causal) == (True, (False, False, True), (True, False, False))


@pytest.mark.parametrize("head_dim", range(1, 257))
def test_chunks_hold_the_channels(head_dim):
    chunks = chunks_of(head_dim)
    assert all(width in (16, 32, 64, 128) for width in chunks) and len(chunks) <= 3
    assert head_dim <= sum(chunks) < max(head_dim * 4 / 3, head_dim + 16) + 1


@pytest.mark.parametrize(
    ("name", "least"), [("church-g4", 0.85), ("cifar-d1", 0.75), ("nat-256", 0.25), ("celeba-d1", 0.15), ("l2-1k", 1.0)]
)
def test_share_of_useful_work(name, least, monkeypatch):
    """With the configurations of a GPU: an interpreter's tiles are larger."""
    shapes = pytest.importorskip("benchmarks.shapes").SHAPES
    monkeypatch.setattr(configs, "architecture", lambda device: "default")
    launch = triton_work.launch_of(shapes[name], triton_work.torch_dtype("bfloat16"))
    for order in triton_work.ORDERS:
        assert least <= triton_work.useful_share(launch, order) <= 1
