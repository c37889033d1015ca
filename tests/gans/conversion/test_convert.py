"""Published TransGAN checkpoints: names, shapes, and what the converted networks compute."""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from gans.commands.cli import main
from gans.commands.convert import LAYOUTS
from gans.commands.generators import load_generator
from gans.conversion import layout_transgan, translation
from gans.models.transgan import DiscriminatorConfig, GeneratorConfig
from gans.recipes.config import TrainConfig
from gans.recipes.named import PRESETS, preset
from gans.recipes.registry import build

LISTS = {
    ("cifar10", "generator"): "5ffd2a47b1d5646bb8df09eca20b22736584186a700455dc82e07480154004c4",
    ("cifar10", "discriminator"): "e719a78a40940334c1a79bbb1685f9cc066dad58f2ba3d4e8cb49ca7c12a7d9a",
    ("stl10", "generator"): "2645de22f24c50f9fdc61a434ff0da0e62bd65da38cdf996b703fb7d6c072f68",
    ("stl10", "discriminator"): "cfa6c87a1599def7bd27568ad8f4aa1f47d27a21f8eeeaa28772a213705f1cd5",
    ("church256", "generator"): "95fd5ada846f276604942022d86c60a8404ecf1733b4231618679535ab388a8a",
    ("church256", "discriminator"): "7b29bb3efbbebbd16114962ad1b7ab13a62ebad20c2cefbcfddaa0b49f07273d",
    ("celebahq256", "generator"): "df8eac5e51e6a7d0f39008b04eabf37343686030c7f7ec4420ffd076643277f3",
    ("celebahq256", "discriminator"): "df9b80baee922915181794f81e6f9650ec9b3b66f3aa75c2a96a8e891e4eb3b2",
}
"""SHA-256 of the published networks' "name shape" lines, sorted: the names and shapes themselves are not ours."""


def published_shapes(model: torch.nn.Module, layout: translation.Layout) -> dict[str, tuple[int, ...]]:
    shapes = {source.name: source.shape for source in layout.sources(model, ()).values()}
    return shapes | {name: tuple(extra.shape) for name, extra in layout.extras(model).items()}


@pytest.mark.parametrize(("name", "role"), LISTS)
def test_names_and_shapes_are_those_published(name, role):
    with torch.device("meta"):
        model = build(getattr(preset(name), role))
    shapes = published_shapes(model, LAYOUTS[name])
    lines = sorted(f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == LISTS[name, role]


def test_every_layout_is_checked():
    assert {name for name, _ in LISTS} == layout_transgan.LAYOUTS.keys()
    assert LAYOUTS.keys() <= PRESETS.keys()


# Small networks of the published kind, and what they compute by the published rules, written without our modules.

GENERATOR = GeneratorConfig(latent_dim=5, base_size=3, base_dim=64, depths=(1, 2, 1), windows=(3, 6, 12), heads=2)
DISCRIMINATOR = DiscriminatorConfig(
    image_size=12, patch_dims=(12, 4), depths=(2, 1), windows=(6, 3), heads=2, augment=()
)


def random_published(model: torch.nn.Module, layout: translation.Layout, seed: int) -> dict[str, torch.Tensor]:
    """A state dict as published, with random numbers in all parameters, and the index buffers."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_shapes(model, layout).items():
        if name.endswith("relative_position_index"):
            state[name] = swin_index(math.isqrt(shape[0]))
        else:
            state[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5
    return state


def swin_index(w: int) -> torch.Tensor:
    places = [(y, x) for y in range(w) for x in range(w)]
    rows = [[(a - c + w - 1) * (2 * w - 1) + (b - d + w - 1) for c, d in places] for a, b in places]
    return torch.tensor(rows)


def windowed(x, window):
    """Tokens `(B, N, C)` of a square map as `(B * windows, window^2, C)`, and a way back."""
    batch, tokens, channels = x.shape
    across = math.isqrt(tokens) // window
    shape = (batch, across, window, across, window, channels)

    def back(y):
        return y.view(batch, across, across, window, window, -1).transpose(2, 3).reshape(batch, tokens, -1)

    return x.view(shape).transpose(2, 3).reshape(-1, window**2, channels), back


def published_cross_attention(state, prefix, x, context, heads):
    q = x @ state[prefix + "q_transform.weight"].T
    k, v = (context @ state[f"{prefix}{name}_transform.weight"].T for name in "kv")
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
    scores = torch.einsum("bihc,bjhc->bhij", q, k) / math.sqrt(q.shape[-1])
    y = torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v).flatten(2)
    return x + F.linear(y, state[prefix + "proj.weight"], state[prefix + "proj.bias"])


def published_block(state, prefix, x, heads, norm, noise, window=None, context=None):
    """Tokens `(B, N, C)`: attention with a bias by query minus key, then the MLP; in windows, if there are any."""
    if context is not None:
        x = published_cross_attention(state, prefix + "cross_attention.", x, context, heads)
    if window is not None:
        parts, back = windowed(x, window)
        return back(published_block(state, prefix, parts, heads, norm, noise))

    def normed(name, x):
        if norm == "rms":
            return x / (x.square().mean(-1, keepdim=True) + 1e-8).sqrt()
        weight, bias = (state[f"{prefix}{name}.norm.{kind}"] for kind in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    batch, tokens, channels = x.shape
    y = normed("norm1", x)
    if noise:
        y = y + torch.randn(batch, tokens, 1, dtype=y.dtype) * state[prefix + "attn.noise_strength_1"]
    q, k, v = (y @ state[prefix + "attn.qkv.weight"].T).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhic,bhjc->bhij", q, k) / math.sqrt(channels // heads)
    table = state.get(prefix + "attn.relative_position_bias_table")
    if table is not None:
        scores = scores + table[swin_index(math.isqrt(tokens))].permute(2, 0, 1)
    y = torch.einsum("bhij,bhjc->bihc", scores.softmax(-1), v).reshape(batch, tokens, channels)
    x = x + F.linear(y, state[prefix + "attn.proj.weight"], state[prefix + "attn.proj.bias"])
    y = F.linear(normed("norm2", x), state[prefix + "mlp.fc1.weight"], state[prefix + "mlp.fc1.bias"])
    return x + F.linear(F.gelu(y), state[prefix + "mlp.fc2.weight"], state[prefix + "mlp.fc2.bias"])


def published_generator(state, config, z):
    x = F.linear(z, state["l1.weight"], state["l1.bias"]).view(len(z), -1, config.base_dim)
    for i, depth in enumerate(config.depths):
        side = config.base_size * 2**i
        if i > 0:
            maps = x.transpose(1, 2).reshape(len(z), -1, side // 2, side // 2)
            x = F.pixel_shuffle(maps, 2).flatten(2).transpose(1, 2)
        x = x + state[f"pos_embed_{i + 1}"]
        for j in range(depth):
            prefix = f"blocks.block.{j}." if i == 0 else f"upsample_blocks.{i - 1}.block.{j}."
            x = published_block(state, prefix, x, config.heads, config.norm, noise=False)
    maps = x.transpose(1, 2).reshape(len(z), -1, side, side)
    return F.conv2d(maps, state["deconv.0.weight"], state["deconv.0.bias"])


def published_large_generator(state, config, z):
    x = F.linear(z, state["l1.weight"], state["l1.bias"]).view(len(z), -1, config.base_dim)
    context = F.linear(z, state["embedding_transform.weight"], state["embedding_transform.bias"])
    context = context.view(len(z), -1, config.base_dim) + state["embed_pos"]
    for i, (depth, window) in enumerate(zip(config.depths, config.windows, strict=True)):
        side = config.base_size * 2**i
        if i > 0:
            maps = x.transpose(1, 2).reshape(len(z), -1, side // 2, side // 2)
            bicubic = i <= config.bicubic
            maps = F.interpolate(maps, scale_factor=2, mode="bicubic") if bicubic else F.pixel_shuffle(maps, 2)
            x = maps.flatten(2).transpose(1, 2)
        x = x + state[f"pos_embed_{i + 1}"]
        for j in range(depth):
            prefix = f"blocks_{i + 1}.block.{j}."
            x = published_block(state, prefix, x, config.heads, config.norm, False, window, context)
    maps = x.transpose(1, 2).reshape(len(z), -1, side, side)
    return F.conv2d(maps, state["deconv.0.weight"], state["deconv.0.bias"])


def published_discriminator(state, config, images):
    x = None
    for i, depth in enumerate(config.depths):
        patch = config.patch_size * 2**i
        tokens = F.conv2d(images, state[f"fRGB_{i + 1}.weight"], state[f"fRGB_{i + 1}.bias"], stride=patch)
        side = tokens.shape[-1]
        if x is not None:
            pooled = F.avg_pool2d(x.transpose(1, 2).reshape(len(images), -1, 2 * side, 2 * side), 2)
            tokens = torch.cat([pooled, tokens], dim=1)
        x = tokens.flatten(2).transpose(1, 2) + state[f"pos_embed_{i + 1}"]
        for j in range(depth):
            x = published_block(state, f"blocks_{i + 1}.{j}.", x, config.heads, config.norm, noise=True)
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), x], dim=1)
    x = published_block(state, "last_block.0.", x, config.heads, config.norm, noise=True)[:, 0]
    if config.norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], state["norm.norm.weight"], state["norm.norm.bias"])
    else:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-8).sqrt()
    return F.linear(x, state["head.weight"], state["head.bias"]).squeeze(-1)


def converted(config, seed, preset_name="cifar10"):
    layout = LAYOUTS[preset_name]
    model = build(config).double()
    state = random_published(model, layout, seed)
    model.load_state_dict(translation.translate(state, model, layout, "state"))
    return state, model


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_converted_generator_computes_what_the_published_one_does(norm):
    config = replace(GENERATOR, norm=norm)
    state, model = converted(config, seed=1)
    z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(z), published_generator(state, config, z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_converted_discriminator_computes_what_the_published_one_does(norm):
    config = replace(DISCRIMINATOR, norm=norm)
    state, model = converted(config, seed=3)
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(5)
    expected = published_discriminator(state, config, images)
    torch.manual_seed(5)
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_converted_large_generator_computes_what_the_published_one_does():
    """Windows, a bicubic doubling, cross attention, a first stage without blocks."""
    config = GeneratorConfig(
        latent_dim=5,
        base_size=2,
        base_dim=32,
        depths=(0, 1, 2),
        windows=(2, 4, 4),
        heads=2,
        norm="rms",
        bicubic=1,
        cross_attention=True,
    )
    state, model = converted(config, seed=6, preset_name="celebahq256")
    z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(model(z), published_large_generator(state, config, z), rtol=1e-9, atol=1e-9)


# Files


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A published file for a preset called "cifar10" with small networks: its path, its content and the recipe."""
    recipe = TrainConfig(generator=GENERATOR, discriminator=DISCRIMINATOR)
    layout = LAYOUTS["cifar10"]
    monkeypatch.setitem(PRESETS, "cifar10", type(PRESETS["cifar10"])(recipe, "published"))
    generator, discriminator = build(recipe.generator), build(recipe.discriminator)
    average = random_published(generator, layout, 2)
    content = {
        "epoch": 7,
        "best_fid": np.float64(9.3),
        "path_helper": {"prefix": "logs"},
        "gen_optimizer": {"state": {}, "param_groups": []},
        "gen_state_dict": {f"module.{key}": value for key, value in random_published(generator, layout, 1).items()},
        "avg_gen_state_dict": {key: value for key, value in average.items() if not key.endswith("index")},
        "dis_state_dict": random_published(discriminator, layout, 3),
    }
    for network in ("gen_state_dict", "avg_gen_state_dict", "dis_state_dict"):
        content[network] = {
            key: value.float() if value.is_floating_point() else value for key, value in content[network].items()
        }
    path = tmp_path / "published.pth"

    def write() -> None:
        torch.save(content, path)

    write()
    return path, content, write


def run(path, out):
    return main(["convert", "--checkpoint", str(path), "--preset", "cifar10", "--out", str(out)])


def test_files(published, tmp_path, capsys):
    path, content, _ = published
    assert run(path, tmp_path / "ours") == 0
    names = {file.name for file in (tmp_path / "ours").iterdir()}
    assert names == {
        "config.json",
        "SHA256SUMS",
        *(f"{n}.safetensors" for n in ("generator", "generator_ema", "discriminator")),
    }
    assert len({file.stat().st_mode for file in (tmp_path / "ours").iterdir()}) == 1  # the umask's
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["converted_from"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    generator = load_generator(tmp_path / "ours", torch.device("cpu")).double()
    z = torch.randn(2, 5, dtype=torch.float64)
    average = {key: value.double() for key, value in content["avg_gen_state_dict"].items()}
    torch.testing.assert_close(generator(z), published_generator(average, GENERATOR, z), rtol=1e-9, atol=1e-9)
    capsys.readouterr()
    assert run(path, tmp_path / "ours") == 1
    assert "exists" in capsys.readouterr().err
    weights = tmp_path / "ours" / "generator_ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=rf"cannot read {weights}: its checksum is not the one in SHA256SUMS"):
        load_generator(tmp_path / "ours", torch.device("cpu"))


def test_what_does_not_fit_is_named(published, tmp_path, capsys):
    path, content, write = published
    generator = content["gen_state_dict"]
    generator["module.extra.weight"] = torch.zeros(2)
    del generator["module.l1.bias"]
    generator["module.deconv.0.weight"] = torch.zeros(3, 2, 1, 1)
    generator["module.blocks.block.0.attn.relative_position_index"] = swin_index(3).T.contiguous()
    write()
    assert run(path, tmp_path / "ours") == 1
    error = capsys.readouterr().err
    for message in (
        "gen_state_dict does not fit this preset: 4 problems",
        "unknown: extra.weight",
        "missing: l1.bias",
        "deconv.0.weight has shape (3, 2, 1, 1), not (3, 4, 1, 1)",
        "blocks.block.0.attn.relative_position_index is not the constant",
    ):
        assert message in error
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing half-written is left


def test_unknown_and_missing_networks_are_named(published, tmp_path, capsys):
    path, content, write = published
    content["another"] = content.pop("dis_state_dict")
    write()
    assert run(path, tmp_path / "ours") == 1
    error = capsys.readouterr().err
    assert "missing: dis_state_dict" in error and "unknown: another" in error


@pytest.mark.parametrize("role", ["generator", "discriminator"])
def test_a_state_dict_alone(published, tmp_path, capsys, role):
    path, content, _ = published
    name = {"generator": "generator_ema", "discriminator": "discriminator"}[role]
    state = OrderedDict(content[f"{role[:3]}_state_dict"])
    torch.save(state, path)
    assert run(path, tmp_path / "alone") == 0
    assert {file.name for file in (tmp_path / "alone").iterdir()} == {
        "config.json",
        "SHA256SUMS",
        f"{name}.safetensors",
    }
    torch.save(content, path)
    assert run(path, tmp_path / "whole") == 0
    expected = load_file(tmp_path / "whole" / f"{role}.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "alone" / f"{name}.safetensors"), expected, rtol=0, atol=0)
    state.popitem(last=False)
    torch.save(state, path)
    capsys.readouterr()
    assert run(path, tmp_path / "incomplete") == 1
    assert capsys.readouterr().err.startswith(f"error: the state dict of a {role} does not fit this preset: 1 problems")


def test_what_is_no_state_dict_is_named(published, tmp_path, capsys):
    path, content, write = published
    average = content["avg_gen_state_dict"]
    average["l1.bias"] = [1.0]
    content["dis_state_dict"] = None
    write()
    assert run(path, tmp_path / "ours") == 1
    assert "dis_state_dict is a NoneType, not a state dict" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"avg_gen_state_dict does not fit .* 1 problems\n  l1\.bias is no tensor: \[1\.0\]"
    ):
        translation.translate(average, build(GENERATOR), LAYOUTS["cifar10"], "avg_gen_state_dict")
    torch.save({"w": torch.zeros(2)}, path)
    assert run(path, tmp_path / "ours") == 1
    assert "none of the checkpoint's 1 tensors is one of this preset's networks" in capsys.readouterr().err


def test_bad_files(tmp_path, capsys):
    (tmp_path / "noise.pth").write_bytes(b"no checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("noise.pth", "cannot be read"),
        ("list.pth", "holds a list"),
        ("missing.pth", "is not a file"),
    ):
        assert run(tmp_path / name, tmp_path / "ours") == 1
        assert message in capsys.readouterr().err
    assert main(["convert", "--checkpoint", "x", "--preset", "digits", "--out", "y"]) == 1
    assert "published checkpoints are known for" in capsys.readouterr().err
