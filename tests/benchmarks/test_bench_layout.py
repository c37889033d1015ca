"""Index tensors of the candidates that are written in plain PyTorch."""

from dataclasses import replace

import pytest
import torch

from benchmarks.layout import (
    dense_index,
    from_windows,
    grid_index,
    heads_first,
    heads_last,
    neighborhood_index,
    to_windows,
)
from benchmarks.shapes import GENERAL, SHAPES


def test_neighborhood_index_on_a_volume():
    """Depth causal, height strided, width dilated: the keys of a query at hand, its places, and which are missing."""
    shape = replace(
        GENERAL["hunyuan-na"], size=(3, 4, 6), window=(2, 3, 2), heads=1, dilations=((1, 1, 2),), stride=(1, 2, 1),
        causal=(True, False, False),
    )  # fmt: skip
    keys, places, exists = neighborhood_index(shape, 0)
    assert keys.shape == places.shape == exists.shape == (72, 12)
    at = (
        0 * 24 + 2 * 6 + 3
    )  # depth 0, row 2 (whose leader is row 3), column 3, of which 1 and 3 are nearest on its left
    assert keys[at].view(2, 3, 2)[0].tolist() == [[7, 9], [13, 15], [19, 21]]
    assert exists[at].view(2, 6).tolist() == [[True] * 6, [False] * 6]
    # Offsets 0, -1 to 1 and -1 to 0 in a table of 3 x 5 x 3.
    assert places[at].view(2, 3, 2)[0].tolist() == [[(5 + row) * 3 + column for column in (0, 1)] for row in (1, 2, 3)]


def test_grid_index_is_key_minus_query():
    window = 3
    places = grid_index((window, window))
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
    windows = to_windows(x, (4, 4))
    assert windows.shape == (2 * 6, 3, 16, 5)
    assert torch.equal(windows[1, 2, 5], x[0, 1, 5, 2])
    assert torch.equal(from_windows(windows, shape), x)


def test_window_partition_of_volumes_and_lines():
    for size, window in (((4, 6, 4), (2, 3, 4)), ((6,), (2,))):
        shape = replace(GENERAL["video-swin-t1"], batch=2, size=size, heads=3, head_dim=5, window=window)
        x = torch.randn(shape.query_shape)
        assert torch.equal(from_windows(to_windows(x, window), shape), x)


@pytest.mark.parametrize("name", ["nat-16", "seq-65"])
def test_heads_first_and_back(name):
    shape = replace(SHAPES[name], batch=2)
    x = torch.randn(shape.query_shape)
    assert heads_first(x).shape == (2, shape.heads, shape.queries, shape.head_dim)
    assert torch.equal(heads_last(heads_first(x), shape), x)
