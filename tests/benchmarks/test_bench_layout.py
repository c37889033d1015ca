"""Index tensors of the candidates that are written in plain PyTorch."""

from dataclasses import replace

import pytest
import torch

from benchmarks.layout import dense_index, from_windows, grid_index, heads_first, heads_last, neighbors, to_windows
from benchmarks.shapes import SHAPES


@pytest.mark.parametrize(("length", "kernel", "dilation"), [(8, 3, 1), (9, 3, 2), (11, 4, 2), (7, 7, 1), (10, 2, 5)])
def test_neighbors_by_the_rule(length, kernel, dilation):
    for query, keys in enumerate(neighbors(length, kernel, dilation).tolist()):
        in_class = [i for i in range(length) if i % dilation == query % dilation]
        start = max(0, min(in_class.index(query) - kernel // 2, len(in_class) - kernel))
        assert keys == in_class[start : start + kernel]


def test_grid_index_is_key_minus_query():
    window = 3
    places = grid_index(window)
    for q in range(9):
        for k in range(9):
            dy, dx = k // 3 - q // 3, k % 3 - q % 3
            assert places[q, k] == (dy + 2) * 5 + dx + 2


def test_dense_index_masks_all_but_the_neighborhood():
    shape = replace(SHAPES["nat-16"], size=(14, 15), heads=2)
    places, masked = dense_index(shape, torch.device("cpu"))
    assert masked.shape == places.shape == (2, 210, 210)
    assert ((~masked).sum(-1) == 49).all()
    assert (places[masked] == 0).all()
    # Where a query is its own neighbor the offset is 0: the centre of the table.
    assert (places.diagonal(dim1=1, dim2=2) == 6 * 13 + 6).all()


def test_window_partition_and_back():
    shape = replace(SHAPES["church-g4"], batch=2, size=(8, 12), heads=3, head_dim=5, window=4)
    x = torch.randn(shape.query_shape)
    windows = to_windows(x, 4)
    assert windows.shape == (2 * 6, 3, 16, 5)
    assert torch.equal(windows[1, 2, 5], x[0, 1, 5, 2])
    assert torch.equal(from_windows(windows, shape), x)


@pytest.mark.parametrize("name", ["nat-16", "seq-65"])
def test_heads_first_and_back(name):
    shape = replace(SHAPES[name], batch=2)
    x = torch.randn(shape.query_shape)
    assert heads_first(x).shape == (2, shape.heads, shape.queries, shape.head_dim)
    assert torch.equal(heads_last(heads_first(x), shape), x)
