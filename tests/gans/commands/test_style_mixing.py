"""style-mixing: each image of the table has the styles that its row and its column say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gans.commands.cli import main
from gans.commands.generators import latents
from gans.data.images import to_uint8
from gans.models.stylenat import StyleNATGeneratorConfig
from gans.models.vitgan import ViTGeneratorConfig
from gans.recipes.config import to_dict
from gans.recipes.registry import build

CONFIG = StyleNATGeneratorConfig(
    latent_dim=8, dims=(8, 12), dilations=("1,2",), kernel_size=3, head_dim=4, min_heads=2, depth=2, mapping_depth=1
)
VITGAN = ViTGeneratorConfig(
    latent_dim=8, image_size=8, patch_size=2, dim=12, depth=3, heads=3, mapping_depth=1, mapping_lr_multiplier=1
)


def save(config, folder):
    torch.manual_seed(0)
    generator = build(config).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    folder.mkdir()
    save_file(generator.state_dict(), folder / "generator_ema.safetensors")
    (folder / "config.json").write_text(json.dumps({"recipe": {"generator": to_dict(config)}}))
    return generator


def command(folder, out, *more):
    return main(["style-mixing", "--checkpoint", str(folder), "--out", str(out), "--device", "cpu", *more])


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, VITGAN], ids=["stylenat", "vitgan"])
@pytest.mark.parametrize("blocks", [("--blocks", "0-1"), ()], ids=["given", "default"])
def test_the_table(tmp_path, config, blocks):
    """Both have four blocks, of which the first two are the default."""
    generator = save(config, tmp_path / "checkpoint")
    out = tmp_path / "table.png"
    chosen = ("--rows", "5,1", "--columns", "7,3,2", *blocks, "--batch", "5", "--truncation", "0.7")
    assert command(tmp_path / "checkpoint", out, *chosen) == 0
    size = config.image_size
    table = np.asarray(Image.open(out)).reshape(3, size, 4, size, 3).swapaxes(1, 2)
    assert (table[0, 0] == 255).all()

    def w(seed):
        return generator.map_latents(latents([seed], 8), truncation=0.7)

    def check(tile, styles):
        expected = to_uint8(generator.synthesize(styles))[0].astype(int)
        assert np.abs(tile - expected).max() <= 1 and expected.std() > 5

    for i, row in enumerate((5, 1), 1):
        check(table[i, 0], w(row))
        for j, column in enumerate((7, 3, 2), 1):
            check(table[0, j], w(column))
            check(table[i, j], generator.mix_styles(w(column), w(row), 2))  # the column's before block 2
    assert np.abs(table[1, 1].astype(int) - table[1, 0]).max() > 5 < np.abs(table[1, 1].astype(int) - table[0, 1]).max()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--blocks", "2-4"), "blocks is '2-4'; this generator has blocks 0 to 3"),
        (("--rows", "a"), "rows has 'a'"),
        (("--truncation", "2"), "truncation is 2"),
    ],
)
def test_refusals(tmp_path, capsys, more, message):
    save(CONFIG, tmp_path / "checkpoint")
    assert command(tmp_path / "checkpoint", tmp_path / "x.png", *more) == 1
    assert message in capsys.readouterr().err


def test_the_scale_is_checked_while_arguments_are_parsed(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path, tmp_path / "x.png", "--scale", "0")
    assert "scale is 0; it must be at least 1" in capsys.readouterr().err


def test_no_mapping_network(tmp_path, capsys, tiny):
    save(tiny.generator, tmp_path / "checkpoint")
    assert command(tmp_path / "checkpoint", tmp_path / "x.png") == 1
    assert "space w needs a mapping network" in capsys.readouterr().err
    assert command(tmp_path / "checkpoint", tmp_path / "x.jpg") == 1
    assert "must end in .png" in capsys.readouterr().err
