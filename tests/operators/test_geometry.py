"""Python's geometry against the oracle's lists, and the geometry of C++ against Python's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from natten_ext import geometry
from natten_ext.geometry import AxisWindow
from tests.operators import oracle

axes = st.builds(
    lambda kernel, dilation, more, stride, causal: (
        kernel * dilation + more,
        AxisWindow(kernel, dilation, min(stride, kernel), causal),
    ),
    st.integers(1, 9), st.integers(1, 7), st.integers(0, 30), st.integers(1, 9), st.booleans(),
)  # fmt: skip
"""(length, window) with kernel * dilation <= length and stride <= kernel."""

quick = settings(max_examples=150, deadline=None, derandomize=True)


@given(axes)
@quick
def test_keys_on_an_axis(axis):
    length, window = axis
    keys = geometry.axis_keys(range(length), *axis)
    for position in range(length):
        expected = oracle.axis_neighbors(position, length, *window)
        assert list(window.keys(position, length)) == expected
        exists = keys.exists[position]
        assert exists.tolist() == [True] * len(expected) + [False] * (window.kernel - len(expected))
        assert keys.index[position][exists].tolist() == expected
        assert (keys.index[position][~exists] == expected[0]).all()
        assert torch.equal(keys.offset[position] * window.dilation + position, keys.index[position])


@given(axes)
@quick
def test_properties_of_the_rule(axis):
    """The oracle itself: keys of the query's residue class, in a row, the query among them; as many as the kernel says
    unless windows are causal."""
    length, (kernel, dilation, stride, causal) = axis
    for position in range(length):
        keys = oracle.axis_neighbors(position, length, kernel, dilation, stride, causal)
        assert position in keys
        assert all(0 <= key < length for key in keys)
        assert all(b - a == dilation for a, b in pairwise(keys))
        assert all(abs(key - position) <= (kernel - 1) * dilation for key in keys)
        if causal:
            assert keys[-1] == position
            assert len(keys) <= kernel
            assert len(keys) == min(kernel, position // dilation + 1) or stride > 1
        else:
            assert len(keys) == kernel
            if stride == 1 and keys[0] >= dilation and keys[-1] + dilation < length:  # no border near
                left = (position - keys[0]) // dilation
                assert left == kernel // 2 and kernel - 1 - left == (kernel - 1) // 2


@given(axes)
@quick
def test_which_queries_see_a_key_is_a_range(axis):
    """The inverse neighborhood, which backward kernels walk: consecutive members of the residue class."""
    length, window = axis
    seen_by: dict[int, list[int]] = {key: [] for key in range(length)}
    for position in range(length):
        for key in oracle.axis_neighbors(position, length, *window):
            seen_by[key].append(position)
    for queries in seen_by.values():
        assert queries
        assert queries == list(range(queries[0], queries[-1] + 1, window.dilation))


@given(st.integers(1, 12))
@quick
def test_window_offsets(window):
    offsets = geometry.window_offsets(window)
    assert offsets.shape == (window, window)
    assert all(offsets[q, k] == k - q for q in range(window) for k in range(window))


axis_windows = st.builds(AxisWindow, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans())


@given(st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[axis_windows] * n), min_size=1, max_size=6)))
@quick
def test_codes_come_back(heads):
    count = len(heads[0])
    neighborhood = geometry.Neighborhood(tuple(heads))
    for other in (geometry.Full(), geometry.Grid(neighborhood.kernel), neighborhood):
        assert geometry.decode(other.encode(), count) == other
    assert neighborhood.kernel == tuple(max(head[axis].kernel for head in heads) for axis in range(count))
    assert neighborhood.general == (count > 2 or any(w.causal or w.stride > 1 for head in heads for w in head))
    groups = neighborhood.head_groups()
    assert [head for first, last in groups for head in range(first, last)] == list(range(len(heads)))
    for first, last in groups:
        assert len(set(heads[first:last])) == 1
        assert last == len(heads) or heads[last] != heads[last - 1]


@given(axes)
@quick
def test_cpp_agrees_with_python(axis):
    extension = pytest.importorskip("natten_ext._C")
    length, window = axis
    for position in range(length):
        keys = window.keys(position, length)
        assert extension.axis_keys(position, length, *window) == (keys.start, keys.stop)
    for residue in range(window.dilation):
        members = [p for p in range(length) if p % window.dilation == residue]
        assert extension.class_length(length, window.dilation, residue) == len(members)


def test_examples_by_hand():
    assert oracle.axis_neighbors(0, 7, 3, 1) == [0, 1, 2]
    assert oracle.axis_neighbors(3, 7, 3, 1) == [2, 3, 4]
    assert oracle.axis_neighbors(6, 7, 3, 1) == [4, 5, 6]
    assert oracle.axis_neighbors(3, 7, 4, 1) == [1, 2, 3, 4]  # even: two to the left, one to the right
    assert oracle.axis_neighbors(0, 8, 3, 2) == [0, 2, 4]
    assert oracle.axis_neighbors(7, 8, 3, 2) == [3, 5, 7]
    assert oracle.axis_neighbors(4, 9, 3, 2) == [2, 4, 6]
    assert oracle.axis_neighbors(4, 9, 3, 1, stride=3) == [3, 4, 5]  # the leader of 3, 4, 5 is 4
    assert oracle.axis_neighbors(3, 9, 3, 1, stride=3) == [3, 4, 5]
    assert oracle.axis_neighbors(2, 9, 4, 1, stride=2) == [1, 2, 3, 4]  # of 2, 3 it is 3
    assert oracle.axis_neighbors(8, 9, 4, 1, stride=2) == [5, 6, 7, 8]
    assert oracle.axis_neighbors(1, 9, 3, 1, causal=True) == [0, 1]
    assert oracle.axis_neighbors(5, 9, 3, 1, causal=True) == [3, 4, 5]
    assert oracle.axis_neighbors(4, 9, 4, 1, stride=2, causal=True) == [2, 3, 4]  # the window of 5, up to 4
    assert oracle.axis_neighbors(5, 9, 4, 1, stride=2, causal=True) == [2, 3, 4, 5]
    first = oracle.grid_neighbors((2, 4), (2, 2))[2]
    assert first == ((2, (0, 0)), (3, (0, 1)), (6, (1, 0)), (7, (1, 1)))
    sliding = oracle.sliding_neighbors((3, 3), (1, 3), (1, 1), (1, 1), (False, False))
    assert sliding[3] == ((3, (0, 0)), (4, (0, 1)), (5, (0, 2)))
    deep = oracle.sliding_neighbors((2, 1, 2), (2, 1, 1), (1, 1, 1), (1, 1, 1), (True, False, False))
    assert deep == (
        ((0, (0, 0, 0)),),
        ((1, (0, 0, 0)),),
        ((0, (-1, 0, 0)), (2, (0, 0, 0))),
        ((1, (-1, 0, 0)), (3, (0, 0, 0))),
    )
