"""Python's geometry against the oracle's lists, and the geometry of C++ against Python's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from natten_ext import geometry
from tests.operators import oracle

axes = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(0, 30)).map(
    lambda t: (t[0] * t[1] + t[2], t[0], t[1])
)
"""(length, kernel, dilation) with kernel * dilation <= length."""

quick = settings(max_examples=150, deadline=None, derandomize=True)


@given(axes)
@quick
def test_neighbors_on_an_axis(axis):
    length, kernel, dilation = axis
    indices, offsets = geometry.neighbor_indices(*axis), geometry.neighbor_offsets(*axis)
    for position in range(length):
        expected = oracle.axis_neighbors(position, length, kernel, dilation)
        assert geometry.window_start(position, length, kernel, dilation) == expected[0]
        assert indices[position].tolist() == expected
        assert (offsets[position] * dilation + position).tolist() == expected


@given(axes)
@quick
def test_properties_of_the_rule(axis):
    """The oracle itself: exactly `kernel` keys of the query's residue class, in a row, the query among them."""
    length, kernel, dilation = axis
    for position in range(length):
        keys = oracle.axis_neighbors(position, length, kernel, dilation)
        assert len(keys) == kernel and position in keys
        assert all(0 <= key < length for key in keys)
        assert all(b - a == dilation for a, b in pairwise(keys))
        left = (position - keys[0]) // dilation
        if keys[0] >= dilation and keys[-1] + dilation < length:  # no border near
            assert left == kernel // 2 and kernel - 1 - left == (kernel - 1) // 2
        assert all(abs(key - position) <= (kernel - 1) * dilation for key in keys)


@given(axes)
@quick
def test_which_queries_see_a_key_is_a_range(axis):
    """The inverse neighborhood, which backward kernels walk: consecutive members of the residue class."""
    length, kernel, dilation = axis
    seen_by: dict[int, list[int]] = {key: [] for key in range(length)}
    for position in range(length):
        for key in oracle.axis_neighbors(position, length, kernel, dilation):
            seen_by[key].append(position)
    for queries in seen_by.values():
        assert queries
        assert queries == list(range(queries[0], queries[-1] + 1, dilation))


@given(st.integers(1, 12))
@quick
def test_window_offsets(window):
    offsets = geometry.window_offsets(window)
    assert offsets.shape == (window, window)
    assert all(offsets[q, k] == k - q for q in range(window) for k in range(window))


pairs = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(st.lists(st.tuples(pairs, pairs), min_size=1, max_size=6))
@quick
def test_codes_come_back(heads):
    kernels, dilations = (tuple(field) for field in zip(*heads, strict=True))
    for neighborhood in (
        geometry.Full(),
        geometry.Grid(kernels[0]),
        geometry.Neighborhood(kernels, dilations),
    ):
        assert geometry.decode(neighborhood.encode()) == neighborhood
    neighborhood = geometry.Neighborhood(kernels, dilations)
    assert neighborhood.kernel == (max(k[0] for k in kernels), max(k[1] for k in kernels))
    groups = neighborhood.head_groups()
    assert [head for first, last in groups for head in range(first, last)] == list(range(len(heads)))
    for first, last in groups:
        assert len(set(heads[first:last])) == 1
        assert last == len(heads) or heads[last] != heads[last - 1]


@given(axes)
@quick
def test_cpp_agrees_with_python(axis):
    extension = pytest.importorskip("natten_ext._C")
    length, _, dilation = axis
    for position in range(length):
        assert extension.window_start(position, *axis) == geometry.window_start(position, *axis)
    for residue in range(dilation):
        members = [p for p in range(length) if p % dilation == residue]
        assert extension.class_length(length, dilation, residue) == len(members)


def test_examples_by_hand():
    assert oracle.axis_neighbors(0, 7, 3, 1) == [0, 1, 2]
    assert oracle.axis_neighbors(3, 7, 3, 1) == [2, 3, 4]
    assert oracle.axis_neighbors(6, 7, 3, 1) == [4, 5, 6]
    assert oracle.axis_neighbors(3, 7, 4, 1) == [1, 2, 3, 4]  # even: two to the left, one to the right
    assert oracle.axis_neighbors(0, 8, 3, 2) == [0, 2, 4]
    assert oracle.axis_neighbors(7, 8, 3, 2) == [3, 5, 7]
    assert oracle.axis_neighbors(4, 9, 3, 2) == [2, 4, 6]
    assert oracle.grid_neighbors(2, 4, (2, 2))[2] == ((2, 0, 0), (3, 0, 1), (6, 1, 0), (7, 1, 1))
    assert oracle.sliding_neighbors(3, 3, (1, 3), (1, 1))[3] == ((3, 0, 0), (4, 0, 1), (5, 0, 2))
    assert torch.equal(geometry.neighbor_indices(5, 2, 2)[:, 0], torch.tensor([0, 1, 0, 1, 2]))
