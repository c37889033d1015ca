"""What explore shows, without its page: the images of the other commands, and the generators' own attention weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from gans.commands.explorer import WAY, Explorer, View
from gans.commands.generators import latents, render
from gans.commands.interpolate import slerp
from gans.evaluation.attention_maps import AttentionMaps
from gans.evaluation.heat_maps import DIMMED, LEAST_SIDE, MARK, heat_map, table
from gans.models.fastgan import FastGANGeneratorConfig
from gans.recipes.registry import build
from natten_ext import GridAttention, NeighborhoodAttention
from tests.gans.attending_generators import GENERATORS


def generator_of(name, **changes):
    torch.manual_seed(0)
    generator = build(replace(GENERATORS[name], **changes)).eval()
    for parameter in generator.parameters():
        parameter.requires_grad_(False).add_(0.05 * torch.randn_like(parameter))
    return generator


def rendered(generator, seeds, **options):
    return torch.cat(list(render(generator, seeds, **options)))


@pytest.mark.parametrize("name", GENERATORS)
def test_images_are_those_of_the_seeds(name):
    generator = generator_of(name)
    explorer = Explorer(generator)
    one, two = rendered(generator, [5, 6])
    torch.testing.assert_close(explorer.image(View(5)), one)
    way = View(5, mode="interpolate", second=6, position=0.25)
    between = explorer.between(way)
    assert len(between) == WAY
    torch.testing.assert_close(between[0], one)
    torch.testing.assert_close(between[2], explorer.image(way))
    z = slerp(*latents([5, 6], generator.config.latent_dim), torch.tensor([0.25, 1.0]))
    third, last = rendered(generator, [5, 5], codes=z)
    torch.testing.assert_close(explorer.image(way), third)
    torch.testing.assert_close(between[-1], last)
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted({*GENERATORS} - {"transgan"}))
def test_styles_truncation_and_classes(name):
    generator = generator_of(name, classes=3)
    generator.class_names = ["ant", "bee", "cat"]
    explorer = Explorer(generator)
    assert explorer.classes == ["ant", "bee", "cat"] and len(explorer.blocks) == generator.config.blocks
    bee = View(5, 0.5, "bee")
    torch.testing.assert_close(explorer.image(bee), rendered(generator, [5], truncation=0.5, name="bee")[0])
    assert (explorer.image(bee) - explorer.image(View(5, 0.5))).abs().max() > 1e-4  # seed 5 is a cat
    labels = torch.tensor([2, 0])
    w = generator.map_latents(latents([5, 6], generator.config.latent_dim), labels, truncation=0.5)
    mixed = View(5, 0.5, mode="mix styles", second=6, blocks=(0,))
    expected = generator.mix_styles(w[1:], w[:1], 1)
    torch.testing.assert_close(explorer.image(mixed), rendered(generator, [5], codes=expected, space="w")[0])
    both = rendered(generator, [5, 5], codes=w, space="w")
    torch.testing.assert_close(explorer.between(mixed), both)
    torch.testing.assert_close(explorer.image(replace(mixed, blocks=())), both[0])
    half = replace(mixed, mode="interpolate", space="w")
    torch.testing.assert_close(
        explorer.image(half), rendered(generator, [5], codes=w.mean(0, keepdim=True), space="w")[0]
    )


def window_of(row, side):
    """The keys on one axis that the query `row` sees in windows, each with its place in the table."""
    first = row // side * side
    return {key: key - row + side - 1 for key in range(first, first + side)}


def neighbours_of(row, length, kernel, dilation):
    """The same in neighborhoods."""
    alike = range(row % dilation, length, dilation)
    start = min(max(row // dilation - kernel // 2, 0), len(alike) - kernel)
    return {key: (key - row) // dilation + kernel - 1 for key in alike[start : start + kernel]}


def naive_weights(module, x, row, column, head):
    """One weight after the other, from queries, keys and the table."""
    query, key = (module._query_and_key(x) if hasattr(module, "_query_and_key") else module._project(x))[:2]
    side = int(query[0, ..., 0, 0].numel() ** 0.5)
    query, key = (y[0, ..., head, :].reshape(side, side, -1) for y in (query, key))
    if isinstance(module, NeighborhoodAttention):
        dilations = module.dilation if isinstance(module.dilation, list) else [module.dilation] * module.num_heads
        dilation = dilations[head * len(dilations) // module.num_heads]
        rows, columns = (neighbours_of(at, side, 3, dilation) for at in (row, column))
    elif isinstance(module, GridAttention):
        rows, columns = map(window_of, (row, column), module.window_size)
    else:
        rows, columns = (dict.fromkeys(range(side)) for _ in "12")
    scores = torch.full((side, side), -torch.inf)
    for i, place in rows.items():
        for j, other in columns.items():
            q, k = query[row, column], key[i, j]
            score = -(q - k).square().sum() if getattr(module, "score", "dot") == "l2" else q @ k
            scores[i, j] = score * query.shape[-1] ** -0.5
            if getattr(module, "rel_pos_bias", None) is not None:
                scores[i, j] += module.rel_pos_bias[head, place, other]
    return scores.flatten().softmax(0).view(side, side)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("pixel", [(15, 2), (6, 9)])
def test_looks_are_the_generators_own_weights(name, pixel):
    generator = generator_of(name)
    explorer = Explorer(generator)
    size = generator.config.image_size
    row, column = (at * size // 16 for at in pixel)
    inputs = {}
    modules = {n: m for n, m in generator.named_modules() if hasattr(m, "attention_weights")}
    for n, module in modules.items():
        module.register_forward_hook(lambda module, x, y, n=n: inputs.update({n: x[0]}))
    rendered(generator, [7])
    looks = explorer.looks(View(7), (row, column), every_module=True)
    assert [entry.name for entry in looks] == list(modules)
    for entry in looks:
        heads, side = entry.weights.shape[1:3]
        at = row * side // size, column * side // size
        expected = [naive_weights(modules[entry.name], inputs[entry.name], *at, head) for head in range(heads)]
        torch.testing.assert_close(entry.weights[0], torch.stack(expected), rtol=1e-4, atol=1e-6)
    shown = explorer.looks(View(7), (row, column))
    assert len({entry.weights.shape[-1] for entry in looks}) == len(shown)
    with pytest.raises(ValueError, match=rf"pixels has {size},0, which lies outside"):
        explorer.looks(View(7), (size, 0))


def test_a_click_makes_no_new_image():
    generator = generator_of("stylenat")
    explorer = Explorer(generator)
    passes = []
    generator.register_forward_hook(lambda *_: passes.append(1))
    for pixel in ((0, 0), (3, 4)):
        explorer.looks(View(3), pixel)
        explorer.image(View(3))
    assert len(passes) == 1


def test_a_generator_without_attention():
    explorer = Explorer(build(FastGANGeneratorConfig(latent_dim=8, image_size=32, width=8)).eval())
    assert not explorer.attends and not explorer.mapped and explorer.blocks == explorer.classes == []
    assert explorer.looks(View(), (0, 0)) == []
    with pytest.raises(ValueError, match="space w needs a mapping network"):
        explorer.image(View(mode="mix styles"))


WEIGHTS = torch.tensor([[0.0, 0.5], [0.25, 0.25]])
GREY = Image.new("RGB", (4, 4), (200, 200, 200))


def test_heat_maps_show_shares_of_the_largest_weight():
    picture = np.asarray(heat_map(GREY, WEIGHTS, (1, 0))).astype(int)
    half = LEAST_SIDE // 2
    assert picture.shape == (LEAST_SIDE, LEAST_SIDE, 3)
    assert (picture[:half, :half] == 200 * DIMMED).all()  # nothing but the image
    assert (picture[:half, half:] == np.round(255 * np.array(colormaps["viridis"](1.0)[:3]))).all()
    middle = 0.5 * 255 * np.array(colormaps["viridis"](0.5)[:3]) + 0.5 * 200 * DIMMED
    assert (picture[half:, half:] == middle.round()).all()
    assert tuple(picture[half, 0]) == tuple(picture[-1, half - 1]) == MARK  # around the query
    one = torch.zeros(LEAST_SIDE, LEAST_SIDE)
    one[40, 50] = 1.0
    picture = np.asarray(heat_map(GREY, one, (40, 50))).astype(int)
    assert (picture[40, 50] == np.round(255 * np.array(colormaps["viridis"](1.0)[:3]))).all()  # one pixel, not hidden
    assert tuple(picture[37, 50]) == tuple(picture[40, 53]) == MARK


def test_tables_have_a_picture_for_each_head():
    weights = torch.stack([WEIGHTS, WEIGHTS.t(), WEIGHTS])[None]
    groups = (("dilation 1", 0, 1), ("dilation 2", 1, 3))
    html = table([AttentionMaps("levels.1.<attn>", weights, ((0, 0),), groups)], GREY)
    assert html.count("data:image/png;base64,") == 3 and html.count("up to 0.5") == 3 and "2x2" in html
    assert "levels.1.&lt;attn&gt;, head 2, dilation 2" in html and "<attn>" not in html
