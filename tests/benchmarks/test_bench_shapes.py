"""The named shapes and the suites, against the tables they come from."""

import pytest

from benchmarks.shapes import GENERAL, NAMED, SHAPES, Shape
from benchmarks.suites import SUITES, how_scaled
from natten_ext.checks import check_windows

# name: size, heads, head_dim, window, table
GRIDS = {
    "cifar-g1": (8, 4, 256, 8, True),
    "cifar-g2": (16, 4, 64, 16, True),
    "cifar-g3": (32, 4, 16, 32, True),
    "stl-g1": (12, 4, 256, 12, True),
    "stl-g2": (24, 4, 64, 24, True),
    "stl-g3": (48, 4, 16, 48, True),
    "church-g2": (16, 4, 256, 16, True),
    "church-g3": (32, 4, 256, 32, True),
    "church-g4": (64, 4, 64, 16, True),
    "church-g5": (128, 4, 16, 16, True),
    "church-g6": (256, 4, 4, 16, True),
    "cifar-d1": (16, 4, 72, 16, True),
    "cifar-d2": (8, 4, 96, 8, True),
    "church-d1": (64, 4, 72, 16, True),
    "church-d1-full": (64, 4, 72, 64, True),
    "church-d2": (32, 4, 84, 32, True),
    "church-d3": (16, 4, 96, 16, True),
    "celeba-d1": (128, 4, 24, 4, False),
    "celeba-d2": (64, 4, 48, 4, False),
}
# name: heads, head_dim, dilations
NEIGHBORHOODS = {
    "nat-8": (16, 32, (1,)),
    "nat-16": (16, 32, (1, 2)),
    "nat-32": (16, 32, (1, 4)),
    "nat-64": (16, 32, (1, 8)),
    "nat-128": (8, 32, (1, 16)),
    "nat-256": (4, 32, (1, 32)),
    "nat-512": (4, 16, (1, 64)),
    "nat-1024": (4, 8, (1, 128)),
}
# name: tokens, keys, heads, head_dim, score, tied
SEQUENCES = {
    "seq-65": (65, 65, 4, 96, "dot", False),
    "seq-145": (145, 145, 4, 96, "dot", False),
    "seq-257": (257, 257, 4, 96, "dot", False),
    "seq-1025": (1025, 1025, 4, 96, "dot", False),
    "cross-256": (256, 64, 4, 256, "dot", False),
    "cross-1024": (1024, 64, 4, 256, "dot", False),
    "cross-4096": (4096, 64, 4, 64, "dot", False),
    "cross-16384": (16384, 64, 4, 16, "dot", False),
    "cross-65536": (65536, 64, 4, 4, "dot", False),
    "full-1k": (1024, 1024, 8, 64, "dot", False),
    "vitgan-d": (65, 65, 6, 64, "l2", True),
    "l2-1k": (1024, 1024, 8, 64, "l2", False),
    "l2-4k": (4096, 4096, 8, 64, "l2", False),
    "l2-gat": (257, 257, 16, 72, "l2", False),
}


def test_every_named_shape_is_there():
    assert set(SHAPES) == {*GRIDS, *NEIGHBORHOODS, *SEQUENCES}


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name):
    shape, (side, heads, head_dim, window, table) = SHAPES[name], GRIDS[name]
    assert (shape.kind, shape.size, shape.heads, shape.head_dim) == ("grid", (side, side), heads, head_dim)
    assert (shape.window, shape.table, shape.score) == (window, table, "dot")


@pytest.mark.parametrize("name", NEIGHBORHOODS)
def test_neighborhoods(name):
    shape, (heads, head_dim, dilations) = SHAPES[name], NEIGHBORHOODS[name]
    side = int(name.split("-")[1])
    assert (shape.kind, shape.size, shape.window, shape.table) == ("neighborhood", (side, side), 7, True)
    assert (shape.heads, shape.head_dim, shape.dilations) == (heads, head_dim, dilations)


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name):
    shape, (tokens, keys, heads, head_dim, score, tied) = SHAPES[name], SEQUENCES[name]
    assert (shape.kind, shape.size, shape.key_tokens, shape.table) == ("full", (tokens,), keys, False)
    assert (shape.heads, shape.head_dim, shape.score, shape.tied) == (heads, head_dim, score, tied)


def test_batches_of_the_l2_shapes():
    assert {name: SHAPES[name].batch for name in ("vitgan-d", "l2-1k", "l2-4k", "l2-gat")} == {
        "vitgan-d": 128,
        "l2-1k": 8,
        "l2-4k": 2,
        "l2-gat": 32,
    }


def test_suite_gpu_is_every_shape_unscaled():
    assert SUITES["gpu"] == list(SHAPES.values())


def test_suite_cpu_covers_what_it_must():
    shapes = {shape.name: shape for shape in SUITES["cpu"]}
    assert len(shapes) >= 12
    assert sum(shape.kind == "neighborhood" for shape in shapes.values()) >= 4
    with_table = [shape for shape in shapes.values() if shape.kind == "grid" and shape.table]
    assert len({shape.head_dim for shape in with_table}) >= 4
    assert {"celeba-d1", "cifar-d1", "church-d2", "vitgan-d", "l2-1k"} <= set(shapes)
    assert (shapes["full-1k"].size, shapes["full-1k"].head_dim) == ((1024,), 64)


@pytest.mark.parametrize("shape", SUITES["cpu"], ids=lambda shape: shape.name)
def test_suite_cpu_scales_only_how_much_there_is(shape):
    true = SHAPES[shape.name]
    kept = ("kind", "head_dim", "window", "table", "score", "tied", "keys")
    assert [getattr(shape, name) for name in kept] == [getattr(true, name) for name in kept]
    # Dilations shrink with the map.
    shrunk = true.size[0] // shape.size[0]
    expected = tuple(max(1, d * shape.size[0] // true.size[0]) for d in true.dilations)
    assert shape.dilations == expected if shrunk > 1 else true.dilations


@pytest.mark.parametrize("suite", SUITES)
def test_suites_are_possible(suite):
    for shape in (*SUITES[suite], *NAMED.values()):
        assert shape.heads % len(shape.dilations) == 0
        if shape.kind == "grid":
            assert all(length % window == 0 for length, window in zip(shape.size, shape.kernel, strict=True))
        if shape.kind == "neighborhood":
            check_windows(shape.neighborhood, shape.size)


def test_suite_general_covers_what_it_must():
    """At least six shapes of other models, as they are but for their size: lines, volumes, strides, causal, shifted."""
    shapes = {shape.name: shape for shape in SUITES["general"]}
    assert set(shapes) == set(GENERAL) and len(shapes) >= 6
    assert all(shape.general for shape in shapes.values())
    assert {len(shape.size) for shape in shapes.values()} == {1, 2, 3}
    for name, shape in shapes.items():
        kept = ("kind", "head_dim", "table", "score", "causal", "shift", "dilations")
        assert [getattr(shape, of) for of in kept] == [getattr(GENERAL[name], of) for of in kept]
    assert {name for name, shape in shapes.items() if shape.causal} == {"mimi", "gpt-oss"}
    assert {name for name, shape in shapes.items() if shape.stride != 1} == {"flux-gna", "hunyuan-gna"}
    assert {name for name, shape in shapes.items() if shape.shift} == {"swin-t1", "video-swin-t1"}


def test_how_scaled_names_each_change():
    scaled = {shape.name: how_scaled(shape) for shape in SUITES["cpu"]}
    assert scaled["nat-512"] == "batch 4 -> 1, map 512 -> 128, dilations (1, 64) -> (1, 16)"
    assert how_scaled(SHAPES["nat-512"]) == "as it is"
    general = {shape.name: how_scaled(shape) for shape in SUITES["general"]}
    assert general["hunyuan-gna"] == (
        "map 30x48x80 -> 8x12x20, heads 24 -> 1, window 18x24x24 -> 5x6x6, stride (16, 8, 8) -> (4, 2, 2)"
    )


@pytest.mark.parametrize("shape", NAMED.values(), ids=lambda shape: shape.name)
def test_shapes_survive_json(shape):
    assert Shape.from_dict(shape.to_dict()) == shape


def test_single_head_has_the_dilation_of_its_group():
    shape = SHAPES["nat-256"]
    assert [shape.single_head(head).dilations for head in range(4)] == [(1,), (1,), (32,), (32,)]
