"""Published StyleNAT checkpoints: names, shapes, and what the converted networks compute."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gans.commands.cli import main
from gans.commands.convert import LAYOUTS
from gans.commands.generators import load_generator
from gans.conversion import layout_stylenat, translation
from gans.models.stylenat import StyleNATGeneratorConfig
from gans.models.stylenat_discriminator import StyleNATDiscriminatorConfig
from gans.recipes.named import PRESETS, preset
from gans.recipes.registry import build
from natten_ext import compat

LISTS = {
    ("stylenat-ffhq256", "generator"): "d40689016c5c99ce196a4a9895fe5019b197d66e9b0258a051058d183a162695",
    ("stylenat-ffhq256", "discriminator"): "5ed7d1e63330ae2ef1ea5e51b3df6ad240f7c08bf4eb7998f98f3323c399b01e",
    ("stylenat-ffhq1024", "generator"): "3de22dcb92506d274bb167dcb51d0b32e4059825318d3ecca9aaf3a1a100357e",
    ("stylenat-ffhq1024", "discriminator"): "417f3525d555dd4f0da93b4b33d1f319531096de19ae287dfd3f2118798dcc70",
}
"""SHA-256 of the published networks' "name shape" lines, sorted: the names and shapes themselves are not ours."""

LAYOUT = layout_stylenat.STYLENAT


def published_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    sources = (part for source in LAYOUT.sources(model, ()).values() for part in translation.parts_of(source))
    shapes = {source.name: source.shape for source in sources}
    return shapes | {name: tuple(extra.shape) for name, extra in LAYOUT.extras(model).items()}


@pytest.mark.parametrize(("name", "role"), LISTS)
def test_names_and_shapes_are_those_published(name, role):
    with torch.device("meta"):
        model = build(getattr(preset(name), role))
    lines = sorted(f"{key} {'x'.join(map(str, shape))}" for key, shape in published_shapes(model).items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == LISTS[name, role]
    assert LAYOUTS[name] is LAYOUT


# Small networks of the published kind, and what they compute by the published rules, written without our modules.

GENERATOR = StyleNATGeneratorConfig(
    latent_dim=8,
    dims=(16, 24, 12),
    dilations=("1,2,1,2", "1,4"),
    kernel_size=3,
    head_dim=4,
    min_heads=2,
    mapping_depth=3,
)
DISCRIMINATOR = StyleNATDiscriminatorConfig(image_size=32, width=512, max_dim=24)
PARTITIONS = {8: [(1, 1), (1, 2), (2, 1), (2, 2)], 16: [(1, 1), (2, 4)]}
"""Heads and dilation of each partition, by map."""


def swin_index(w: int) -> torch.Tensor:
    """Query minus key."""
    places = [(y, x) for y in range(w) for x in range(w)]
    rows = [[(a - c + w - 1) * (2 * w - 1) + (b - d + w - 1) for c, d in places] for a, b in places]
    return torch.tensor(rows)


def outer(*taps: float) -> torch.Tensor:
    row = torch.tensor(taps)
    return row[:, None] * row[None, :] / row.sum() ** 2


LOW, HIGH = torch.ones(2) / 2**0.5, torch.tensor([-1.0, 1.0]) / 2**0.5
HAAR = {"ll": (LOW, LOW), "lh": (HIGH, LOW), "hl": (LOW, HIGH), "hh": (HIGH, HIGH)}


def constant(name: str) -> torch.Tensor:
    if name.endswith("index"):
        return swin_index(4).flip(0, 1)
    if name.endswith("kernel"):
        return outer(1, 3, 3, 1) * (4 if "upsample" in name else 1)
    if name.endswith("_float_tensor"):
        return torch.tensor([float("nan")])  # never initialised
    band = name.rsplit(".", 1)[1]
    sign = -1 if ".iwt." in name and band in ("lh", "hl") else 1
    return sign * HAAR[band][0][:, None] * HAAR[band][1][None, :]


def random_published(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    extras = LAYOUT.extras(model)
    state = {}
    for name, shape in published_shapes(model).items():
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith(("weight_u", "weight_v")):
            drawn = F.normalize(drawn, dim=0)
        state[name] = constant(name) if name in extras else drawn * (1 if "weight_" in name else 0.4)
    return state


def leaky(x):
    return F.leaky_relu(x, 0.2) * 2**0.5


def upfirdn(x, kernel, up=1, down=1, pad=(0, 0)):
    """Zeros in between, zeros around, true convolution, every `down`-th."""
    batch, channels, height, width = x.shape
    wide = x.new_zeros(batch, channels, height * up, width * up)
    wide[:, :, ::up, ::up] = x
    wide = F.pad(wide, (*pad, *pad))
    kernel = kernel.to(x).flip(0, 1)[None, None].expand(channels, 1, *kernel.shape)
    return F.conv2d(wide, kernel, groups=channels)[:, :, ::down, ::down]


def published_attention(state, prefix, x, heads, size):
    batch, _, _, channels = x.shape
    qkv = F.linear(x, state[prefix + "qkv.weight"], state[prefix + "qkv.bias"])
    q, k, v = qkv.view(batch, size, size, 3, heads, -1).permute(3, 0, 4, 1, 2, 5)
    q = q * (channels // heads) ** -0.5
    if size == 4:
        scores = torch.einsum("bhyxc,bhjic->bhyxji", q, k).reshape(batch, heads, 16, 16)
        table = state[prefix + "rpb"].permute(1, 2, 0).flatten(0, 1)
        scores = scores + table[state[prefix + "relative_position_index"]].permute(2, 0, 1)
        out = (scores.softmax(-1) @ v.flatten(2, 3)).unflatten(2, (4, 4))
    else:
        outputs, first = [], 0
        for i, (count, dilation) in enumerate(PARTITIONS[size]):
            here = slice(first, first + count)
            scores = compat.na2d_qk(q[:, here], k[:, here], 3, dilation, rpb=state[f"{prefix}rpb.{i}"])
            outputs.append(compat.na2d_av(scores.softmax(-1), v[:, here], 3, dilation))
            first += count
        out = torch.cat(outputs, 1)
    out = out.permute(0, 2, 3, 1, 4).reshape(x.shape)
    return F.linear(out, state[prefix + "proj.weight"], state[prefix + "proj.bias"])


def published_norm(state, prefix, x, w):
    weight = state[prefix + "style.weight"]
    gamma, beta = F.linear(w, weight / weight.shape[1] ** 0.5, state[prefix + "style.bias"])[..., None].chunk(2, 1)
    tokens = F.instance_norm(x.flatten(1, 2).transpose(1, 2))
    return (gamma * tokens + beta).transpose(1, 2).reshape(x.shape)


def sinusoids(length: int, dim: int) -> torch.Tensor:
    frequencies = [10_000 ** (-i / (dim // 2 - 1)) for i in range(dim // 2)]
    rows = [[f(p * w) for f in (math.sin, math.cos) for w in frequencies] for p in range(1, length + 1)]
    return torch.tensor(rows, dtype=torch.float64)


def published_generator(state, config, z):
    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for i in range(config.mapping_depth):
        weight, bias = state[f"style.{i + 1}.weight"], state[f"style.{i + 1}.bias"]
        w = leaky(F.linear(w, weight * 0.01 / weight.shape[1] ** 0.5) + bias * 0.01)
    x = state["input.input"].expand(len(z), -1, -1, -1).permute(0, 2, 3, 1)
    image = None
    for i in range(len(config.dims)):
        size, heads = 4 * 2**i, max(config.dims[i] // config.head_dim, config.min_heads)
        for j in range(2):
            prefix = f"layers.{i}.blocks.{j}."
            x = x + published_attention(
                state, prefix + "attn.", published_norm(state, prefix + "norm1.", x, w), heads, size
            )
            y = published_norm(state, prefix + "norm2.", x, w)
            y = F.gelu(F.linear(y, state[prefix + "mlp.fc1.weight"], state[prefix + "mlp.fc1.bias"]))
            x = x + F.linear(y, state[prefix + "mlp.fc2.weight"], state[prefix + "mlp.fc2.bias"])
        if i + 1 < len(config.dims):
            prefix = f"layers.{i}.upsample."
            x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear").permute(0, 2, 3, 1)
            x = F.layer_norm(x, x.shape[-1:], state[prefix + "norm.weight"], state[prefix + "norm.bias"])
            x = F.linear(x, state[prefix + "reduction.weight"])
            table = sinusoids(2 * size, x.shape[-1] // 2)
            grid = torch.cat([table.expand(2 * size, -1, -1), table[:, None].expand(-1, 2 * size, -1)], 2)
            x = x + state[prefix + "alpha"] * grid
        own = F.conv2d(x.permute(0, 3, 1, 2), state[f"to_rgbs.{i}.conv.weight"], state[f"to_rgbs.{i}.conv.bias"])
        own = own + state[f"to_rgbs.{i}.bias"]
        if image is not None and i + 1 < len(config.dims):
            image = upfirdn(image, state[f"to_rgbs.{i}.upsample.kernel"], up=2, pad=(2, 1))
        image = own if image is None else image + own
    return image  # with ImageNet's mean and deviation


def spectral(state, name):
    weight, u, v = (state[f"{name}.weight_{part}"] for part in ("orig", "u", "v"))
    return weight / (u @ weight.flatten(1) @ v)


def transform(state, prefix, x):
    return torch.cat([upfirdn(x, state[f"{prefix}.{band}"], down=2) for band in HAAR], 1)


def published_discriminator(state, images):
    def act(name, x):
        bias = state[name + ".bias"]
        return leaky(x + bias.view(-1, *[1] * (x.dim() - 2)))

    bands, x = transform(state, "dwt", images), None
    for i in range(3):
        if i:
            prefix = f"from_rgbs.{i}."
            parts = zip(bands.chunk(4, 1), HAAR, strict=True)
            image = sum(upfirdn(part, state[f"{prefix}iwt.{band}"], up=2, pad=(1, 0)) for part, band in parts)
            bands = transform(
                state, prefix + "dwt", upfirdn(image, state[prefix + "downsample.kernel"], down=2, pad=(1, 1))
            )
        y = act(f"from_rgbs.{i}.conv.1", F.conv2d(bands, spectral(state, f"from_rgbs.{i}.conv.0")))
        x = y if x is None else x + y
        if i < 2:
            x = act(f"convs.{i}.conv1.1", F.conv2d(x, spectral(state, f"convs.{i}.conv1.0"), padding=1))
            x = upfirdn(x, state[f"convs.{i}.conv2.0.kernel"], pad=(2, 2))
            x = act(f"convs.{i}.conv2.2", F.conv2d(x, spectral(state, f"convs.{i}.conv2.1"), stride=2))
    deviation = (x.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(len(x), 1, 4, 4)
    x = act("final_conv.1", F.conv2d(torch.cat([x, deviation], 1), spectral(state, "final_conv.0"), padding=1))
    x = act("final_linear.1", F.linear(x.flatten(1), spectral(state, "final_linear.0"), state["final_linear.0.bias"]))
    return F.linear(x, spectral(state, "final_linear.2"), state["final_linear.2.bias"]).squeeze(1)


def converted(config, seed):
    model = build(config).double().eval()
    state = random_published(model, seed)
    model.load_state_dict(translation.translate(state, model, LAYOUT, "state"))
    return state, model


def test_converted_generator_computes_what_the_published_one_does():
    state, model = converted(replace(GENERATOR, normalization="none"), seed=1)
    z = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = published_generator(state, GENERATOR, z)
    torch.testing.assert_close(model(z), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_converted_discriminator_computes_what_the_published_one_does():
    state, model = converted(replace(DISCRIMINATOR, normalization="none"), seed=3)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = published_discriminator(state, images)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def as_in_2022(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same network with two tables a block from 8 px on, `rpb0` and `rpb1`, for half of the heads each."""
    tables: dict[str, list[torch.Tensor]] = {}
    found = {}
    for name, value in state.items():
        table = re.fullmatch(r"(.*\.rpb)\.\d", name)
        if table:
            tables.setdefault(table[1], []).append(value)
        else:
            found[name] = value
    for name, parts in tables.items():
        joined = torch.cat(parts)
        found |= {f"{name}{i}": half for i, half in enumerate(joined.tensor_split([len(joined) // 2]))}
    return found


def test_tables_of_2022():
    model = build(GENERATOR)
    state = random_published(model, 1)
    older = as_in_2022(state)
    assert len(older) < len(state) and "layers.1.blocks.0.attn.rpb1" in older
    expected = translation.translate(state, model, LAYOUT, "state")
    torch.testing.assert_close(translation.translate(older, model, LAYOUT, "state"), expected, rtol=0, atol=0)
    older["layers.1.blocks.0.attn.rpb.0"] = older.pop("layers.1.blocks.0.attn.rpb1")
    with pytest.raises(
        ValueError, match=r"2 problems\n  unknown: layers.1.*attn.rpb.0\n  missing: layers.1.*attn.rpb1"
    ):
        translation.translate(older, model, LAYOUT, "g_ema")


@pytest.mark.parametrize("name", ["stylenat-ffhq256", "stylenat-ffhq1024"])
def test_shapes_of_2022(name):
    """From 8 px on, every block has two tables of 13x13 for half of the heads each; all else is as it was later."""
    with torch.device("meta"):
        model = build(preset(name).generator)
    later = {name: torch.empty(shape, device="meta") for name, shape in published_shapes(model).items()}
    older = as_in_2022(later)
    sources = [part for source in LAYOUT.sources(model, older).values() for part in translation.parts_of(source)]
    assert {source.name: source.shape for source in sources}.items() <= {
        n: (*v.shape,) for n, v in older.items()
    }.items()
    heads = [16, 16, 16, 16, 8, 4, 4, 4][: len(model.config.dims) - 1]
    tables = {source.name: source.shape for source in sources if "rpb" in source.name}
    assert tables == {
        **{f"layers.0.blocks.{j}.attn.rpb": (16, 7, 7) for j in range(2)},
        **{
            f"layers.{i}.blocks.{j}.attn.rpb{half}": (count // 2, 13, 13)
            for i, count in enumerate(heads, 1)
            for j in range(2)
            for half in range(2)
        },
    }


class Options(dict):
    """Stands for the options of another library."""


@pytest.mark.parametrize("year", ["2022", "flat", "nested"])
def test_files(tmp_path, monkeypatch, year):
    recipe = replace(preset("stylenat-64"), generator=GENERATOR, discriminator=replace(DISCRIMINATOR, image_size=16))
    monkeypatch.setitem(PRESETS, "stylenat-ffhq256", replace(PRESETS["stylenat-ffhq256"], recipe=recipe))
    generator, discriminator = build(recipe.generator), build(recipe.discriminator)
    states = {"g_ema": random_published(generator, 1), "d": random_published(discriminator, 2)}
    if year != "flat":
        states["g"] = random_published(generator, 3)
    states = {key: {n: t.float() if t.is_floating_point() else t for n, t in s.items()} for key, s in states.items()}
    content = {
        "flat": states,
        "nested": {"args": {"a": [1, "b"]}, "eval_info": {"fid": 2.05}, "state_dicts": states},
        "2022": {
            **{key: as_in_2022(state) for key, state in states.items()},
            **{"g_optim": {"state": {}}, "d_optim": {"state": {}}, "G_lr": 5e-5, "D_lr": 2e-4},
            "args": Options(batch=8, mean=[0.485]),
        },
    }[year]
    torch.save(content, tmp_path / "published.pt")
    monkeypatch.delattr(sys.modules[__name__], "Options")  # as of a library that is not installed
    arguments = ["--checkpoint", str(tmp_path / "published.pt"), "--preset", "stylenat-ffhq256"]
    assert main(["convert", *arguments, "--out", str(tmp_path / "ours")]) == 0
    names = {file.stem for file in (tmp_path / "ours").glob("*.safetensors")}
    assert names == {"generator_ema", "discriminator"} | (set() if year == "flat" else {"generator"})
    loaded = load_generator(tmp_path / "ours", torch.device("cpu")).double()
    z = torch.randn(2, 8, dtype=torch.float64)
    average = {n: t.double() if t.is_floating_point() else t for n, t in states["g_ema"].items()}
    inner = published_generator(average, GENERATOR, z)
    std, mean = torch.tensor([[0.229, 0.224, 0.225], [0.485, 0.456, 0.406]]).double()[:, :, None, None]
    torch.testing.assert_close(loaded(z), 2 * (inner * std + mean) - 1, rtol=1e-5, atol=1e-5 * float(inner.abs().max()))


def test_a_table_that_is_read_the_other_way_is_refused():
    model = build(GENERATOR)
    state = random_published(model, 1)
    name = "layers.0.blocks.1.attn.relative_position_index"
    state[name] = swin_index(4)
    with pytest.raises(ValueError, match=f"1 problems\n  {name} is not the constant"):
        translation.translate(state, model, LAYOUT, "g_ema")


def test_what_does_not_fit_is_named():
    model = build(DISCRIMINATOR)
    state = random_published(model, 1)
    state["from_rgbs.1.iwt.lh"] = -state["from_rgbs.1.iwt.lh"]
    state["convs.0.conv1.0.weight_orig"] = torch.zeros(2)
    state["more"] = state.pop("final_linear.2.bias")
    with pytest.raises(ValueError) as caught:
        translation.translate(state, model, LAYOUT, "d")
    for message in (
        "d does not fit this preset: 4 problems",
        "unknown: more",
        "missing: final_linear.2.bias",
        "convs.0.conv1.0.weight_orig has shape (2,), not (16, 16, 3, 3)",
        "from_rgbs.1.iwt.lh is not the constant",
    ):
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="missing: g_ema"):
        list(translation.convert({"d": {}}, preset("stylenat-ffhq256"), LAYOUT))
