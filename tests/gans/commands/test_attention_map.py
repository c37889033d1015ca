"""attention-map: what is recorded is what the modules do, for every generator with attention."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import natten_ext
from gans.commands.attention_map import parse_pixels
from gans.commands.cli import main
from gans.evaluation.attention_maps import last_of_each_size, looks, recorded
from gans.models.fastgan import FastGANGeneratorConfig
from gans.recipes.config import to_dict
from gans.recipes.registry import build
from tests.gans.attending_generators import GENERATORS

SIZE = 16
PIXELS = [(15, 2), (6, 9)]


@pytest.mark.parametrize("name", GENERATORS)
def test_recorded_weights_give_back_what_the_modules_compute(name):
    """From what went in, the weights and the values, the output of each module at each pixel."""
    config = GENERATORS[name]
    torch.manual_seed(0)
    generator = build(config).eval()
    size = config.image_size
    pixels = [(row * size // SIZE, column * size // SIZE) for row, column in PIXELS]
    inputs, outputs = {}, {}
    modules = {n: m for n, m in generator.named_modules() if hasattr(m, "attention_weights")}
    for n, module in modules.items():
        module.register_forward_hook(lambda module, x, y, n=n: inputs.update({n: x[0]}) or outputs.update({n: y}))
    with recorded(generator) as entries, torch.no_grad():
        generator(torch.randn(2, config.latent_dim))
    maps = looks(entries, pixels, size)
    assert [m.name for m in maps] == list(modules)
    assert not any(module._forward_pre_hooks for module in modules.values())
    for entry in maps:
        module, x, y = modules[entry.name], inputs[entry.name][:1], outputs[entry.name][:1]
        side = entry.weights.shape[-1]
        assert entry.positions == tuple((row * side // size, column * side // size) for row, column in pixels)
        torch.testing.assert_close(entry.weights.sum((2, 3)), torch.ones(entry.weights.shape[:2]))
        value = module._split(module.value(x)) if name == "vitgan" else module._project(x)[-1]
        mixed = torch.einsum("phk,khd->phd", entry.weights.flatten(2), value[0].flatten(0, -3))
        expected = module.proj(mixed.flatten(1))
        at = [row * side + column for row, column in entry.positions]
        torch.testing.assert_close(y[0].reshape(side * side, -1)[at], expected, rtol=1e-4, atol=1e-5)


def test_dilations_label_their_heads():
    generator = build(GENERATORS["stylenat"]).eval()
    with recorded(generator) as entries, torch.no_grad():
        generator(torch.randn(1, 8))
    maps = looks(entries, PIXELS, SIZE)
    groups = {m.name: m.groups for m in maps}
    assert groups["levels.0.blocks.0.attn"] == (("", 0, 2),)
    assert groups["levels.1.blocks.1.attn"] == (("dilation 1", 0, 2), ("dilation 2", 2, 4))
    assert groups["levels.2.blocks.0.attn"] == (("dilation 1", 0, 1), ("dilation 2", 1, 3))
    assert [m.name for m in last_of_each_size(maps)] == [f"levels.{i}.blocks.1.attn" for i in range(3)]
    (last,) = (m for m in maps if m.name == "levels.2.blocks.1.attn")
    reached = last.weights[1, 2].nonzero().tolist()  # dilation 2 from (6, 9), three keys an axis
    assert reached == [[row, column] for row in (4, 6, 8) for column in (7, 9, 11)]


def test_sequences_that_are_no_map_are_left_out():
    module = torch.nn.Sequential(natten_ext.Attention(8, 2))
    with recorded(module) as entries:
        module(torch.randn(1, 17, 8))
    assert entries == []


@pytest.fixture
def checkpoint(tmp_path):
    def write(config):
        from dataclasses import replace

        from gans.recipes.named import preset

        recipe = replace(
            preset("projected32"),
            generator=config,
            discriminator=replace(
                preset("projected32").discriminator, image_size=config.image_size, channels=config.channels
            ),
        )
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        save_file(build(config).state_dict(), folder / "generator_ema.safetensors")
        (folder / "config.json").write_text(json.dumps({"recipe": to_dict(recipe)}))
        return folder

    return write


@pytest.mark.parametrize("options", [[], ["--per-head", "--every-module", "--pixels", "3,4", "--truncation", "0.5"]])
def test_command(checkpoint, tmp_path, capsys, options):
    arguments = ["--checkpoint", str(checkpoint(GENERATORS["stylenat"])), "--device", "cpu"]
    assert main(["attention-map", *arguments, "--out", str(tmp_path / "map.png"), *options]) == 0
    shown = "6 of 6 modules" if options else "3 of 6 modules"
    assert shown in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "map.png")).std() > 0


def test_what_cannot_be_drawn_is_refused(checkpoint, tmp_path, capsys):
    folder = checkpoint(FastGANGeneratorConfig(latent_dim=8, image_size=32, width=8))
    arguments = ["attention-map", "--checkpoint", str(folder), "--device", "cpu", "--out", str(tmp_path / "map.png")]
    for more, message in (
        ([], "generator without attention"),
        (["--pixels", "1;2"], "pixels has '1;2'"),
        (["--pixels", "1,32"], "pixels has 1,32, which lies outside the 32x32 image"),
        (["--out", str(tmp_path / "map.jpg")], "must end in .png"),
    ):
        assert main([*arguments, *more]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "map.png").exists()


def test_pixels():
    assert parse_pixels((), 64) == [(32, 32), (16, 21)]
    assert parse_pixels(("3,4", "0,63"), 64) == [(3, 4), (0, 63)]
