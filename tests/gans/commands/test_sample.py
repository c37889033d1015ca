"""sample and interpolate, and the generators as the commands see them."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from gans.commands import generators
from gans.commands.cli import main
from gans.commands.interpolate import lerp, save_animation, slerp
from gans.common import rng
from gans.data.images import grid, save_png, to_pil
from gans.recipes.config import to_dict
from gans.recipes.registry import build


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A folder like those that convert writes; its generator draws noise, and strongly so."""
    torch.manual_seed(0)
    generator = build(tiny.generator)
    for module in generator.modules():
        if hasattr(module, "strength"):
            nn.init.ones_(module.strength)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("generator", "generator_ema"):
        save_file(generator.state_dict(), folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps({"recipe": to_dict(tiny)}))
    return folder


def sample(*arguments):
    return main(["sample", *map(str, arguments), "--device", "cpu"])


def error(capsys, *arguments):
    """What a command that must fail says on stderr, on one line."""
    capsys.readouterr()
    try:
        assert main([str(argument) for argument in arguments]) == 1
    except SystemExit as exit:  # tyro's, for values that an arguments class refuses
        assert exit.code == 2
    return " ".join(capsys.readouterr().err.split())


def pixels(path):
    return np.asarray(Image.open(path))


def test_numbers():
    assert generators.parse_numbers("seeds", "0-3,100, 7 - 7") == [0, 1, 2, 3, 100, 7]
    for text in ("", "a", "3-1", "-1", "1,,2", "1.5", f"{2**63}", "0-999999999999999"):
        with pytest.raises(ValueError, match="rows has"):
            generators.parse_numbers("rows", text)


def test_an_image_depends_on_its_seed_only(checkpoint):
    generator = generators.load_generator(checkpoint, torch.device("cpu"))
    seeds = [5, 3, 8, 1, 5]
    together = torch.cat(list(generators.render(generator, seeds, batch=5)))
    torch.manual_seed(1)  # the state of the global generator does not matter
    apart = torch.cat(list(generators.render(generator, seeds, batch=2)))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert torch.equal(together[0], together[4])
    assert (together[0] - together[1]).abs().max() > 0.01
    # With the same z, other noise.
    z = generators.latents([5, 5], generator.config.latent_dim)
    a, b = torch.cat(list(generators.render(generator, [5, 6], codes=z)))
    torch.testing.assert_close(a, together[0], rtol=1e-5, atol=1e-5)
    assert (a - b).abs().max() > 0.01


def test_per_image_noise():
    with rng.per_image([4, 9]):
        a = rng.randn(4, 3, dtype=torch.float64)
        b = rng.rand(2)
        c = rng.randint(0, 100, (2, 5))
        with pytest.raises(RuntimeError, match="multiple of their number"):
            rng.randn(3)
    with rng.per_image([9]):
        # Rows of several per image are repetitions of the batch: image 9 has rows 1 and 3.
        torch.testing.assert_close(rng.randn(2, 3, dtype=torch.float64), a[1::2])
        assert rng.rand(1) == b[1] and torch.equal(rng.randint(0, 100, (1, 5))[0], c[1])
    assert not torch.equal(a[1, :1].float(), torch.randn(1, generator=torch.Generator().manual_seed(9)))


def test_sample_grid_and_files(checkpoint, tmp_path):
    assert (
        sample("--checkpoint", checkpoint, "--out", tmp_path / "a" / "grid.png", "--seeds", "0-5", "--columns", "3")
        == 0
    )
    whole = pixels(tmp_path / "a" / "grid.png")
    assert whole.shape == (16, 24)
    arguments = ["--checkpoint", checkpoint, "--seeds", "4,1", "--batch", "1"]
    assert sample(*arguments, "--out", tmp_path / "files", "--scale", "2") == 0
    assert sample(*arguments, "--out", tmp_path / "files.zip") == 0
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"seed00000001.png", "seed00000004.png"}
    large = pixels(tmp_path / "files" / "seed00000004.png")
    assert np.array_equal(large[::2, ::2], large[1::2, 1::2])
    tile = whole[8:, 8:16]  # row by row, seed 4 is in the second row and column
    assert np.abs(large[::2, ::2].astype(int) - tile).max() <= 1  # another batch rounds otherwise
    with zipfile.ZipFile(tmp_path / "files.zip") as archive:
        assert archive.namelist() == ["seed00000004.png", "seed00000001.png"]
        assert np.array_equal(pixels(archive.open("seed00000004.png")), large[::2, ::2])


def test_sample_refuses(checkpoint, tmp_path, capsys):
    out = ["--out", tmp_path / "x.png"]
    for arguments, message in (
        (["--checkpoint", tmp_path / "missing", *out], "has no config.json and no generator_ema.safetensors"),
        (["--checkpoint", checkpoint, "--out", tmp_path / "x.jpg"], "give a .png file, a .zip file or a folder"),
        (["--checkpoint", checkpoint, *out, "--seeds", "5-1"], "a range goes upwards"),
        (["--checkpoint", checkpoint, *out, "--truncation", "0.5"], "needs a mapping network"),
        (["--checkpoint", checkpoint, *out, "--truncation", "1.5"], "must be in [0, 1]"),
        (["--checkpoint", checkpoint, *out, "--batch", "0"], "batch is 0"),
        (["--checkpoint", checkpoint, *out, "--scale", "0"], "scale is 0"),
        (["--checkpoint", checkpoint, *out, "--columns", "-1"], "columns is -1"),
        (["--checkpoint", checkpoint, *out, "--device", "nothing"], "device is 'nothing'"),
    ):
        assert message in error(capsys, "sample", *arguments)
    assert not (tmp_path / "x.png").exists()


def test_slerp():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    x = slerp(a, b, torch.tensor([0.0, 1 / 3, 0.5, 1.0]))
    torch.testing.assert_close(x[0], a)
    torch.testing.assert_close(x[3], b)
    torch.testing.assert_close(x[1], torch.tensor([2 * math.sqrt(3) / 2, 3 * 0.5]))
    torch.testing.assert_close(x[2], math.sqrt(0.5) * (a + b))
    # Halfway between unit vectors stays on the sphere; on one line there is no circle.
    u, v = nn.functional.normalize(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    torch.testing.assert_close(slerp(u, v, torch.linspace(0, 1, 5)).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(slerp(a, 2 * a, torch.tensor([0.5]))[0], 1.5 * a)
    w = torch.ones(3, 2)
    torch.testing.assert_close(lerp(w, 3 * w, torch.tensor([0.0, 0.25])), torch.stack([w, 1.5 * w]))


def test_interpolate(checkpoint, tmp_path, capsys):
    out = tmp_path / "walk.gif"
    arguments = f"interpolate --checkpoint {checkpoint} --device cpu --steps 4 --sheet-columns 5".split()
    assert main([*arguments, "--out", str(out), "--seeds", "7,2,3"]) == 0
    with Image.open(out) as animation:
        assert animation.n_frames == 12 and animation.info["loop"] == 0  # a circle: 7 to 2 to 3 to 7
    sheet = pixels(tmp_path / "walk-sheet.png")
    assert sheet.shape == (16, 40)
    assert np.array_equal(sheet[:8, 32:], sheet[8:, :8])  # row 1 ends where row 2 begins, noise included
    generator = generators.load_generator(checkpoint, torch.device("cpu"))
    (first,) = generators.render(generator, [7])
    assert np.abs(np.asarray(to_pil(first[0])).astype(int) - sheet[:8, :8]).max() <= 1
    assert main([*arguments, "--out", str(out), "--seeds", "7,2,3", "--no-loop"]) == 0
    with Image.open(out) as animation:
        assert animation.n_frames == 9
    for extra, message in (
        (["--out", str(out), "--seeds", "7"], "needs at least two"),
        (["--out", "x.png"], "must end in .gif"),
        (["--out", str(out), "--space", "w"], "space w needs a mapping network"),
        (["--out", str(out), "--steps", "0"], "steps is 0"),
        (["--out", str(out), "--sheet-columns", "1"], "sheet_columns is 1"),
        (["--out", str(out), "--scale", "0"], "scale is 0"),
        (["--out", str(out), "--fps", "nan"], "fps is nan"),
    ):
        assert message in error(capsys, *arguments, *extra)


def test_video(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    import imageio.v2 as imageio

    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 16, 18)
    save_animation(images, tmp_path / "a.mp4", fps=6)
    frames = imageio.mimread(tmp_path / "a.mp4")
    assert len(frames) == 6 and frames[0].shape == (16, 18, 3)
    assert frames[0].mean() < 20 and frames[5].mean() > 235


@dataclass(frozen=True)
class MappedConfig:
    latent_dim: int = 2
    image_size: int = 1
    channels: int = 1


class Mapped(nn.Module):
    """A mapping network (w = z + 10, whose mean is 10), a synthesis (the sum) and its own normalisation."""

    def __init__(self):
        super().__init__()
        self.config = MappedConfig()
        self.unused = nn.Parameter(torch.zeros(()))

    def map_latents(self, z, *, truncation=1.0):
        return 10 + truncation * z

    def synthesize(self, w):
        return w.sum(1)[:, None, None, None]

    def forward(self, z):
        return self.synthesize(self.map_latents(z))

    def denormalize(self, images):
        return (images - 20) / 2


def test_mapping_networks_are_used():
    generator = Mapped()
    z = generators.latents([1, 2, 3], 2)
    for truncation in (1.0, 0.5, 0.0):
        images = torch.cat(list(generators.render(generator, [1, 2, 3], truncation=truncation, batch=2)))
        torch.testing.assert_close(images.flatten(), (truncation * z.sum(1) / 2).clamp(-1, 1))
    w = generators.to_codes(generator, z, space="w", truncation=0.5)
    images = torch.cat(list(generators.render(generator, [0] * 3, codes=w, space="w")))
    torch.testing.assert_close(images.flatten(), (0.5 * z.sum(1) / 2).clamp(-1, 1))
    (images,) = generators.render(generator, [0], codes=torch.full((1, 2), 40.0), space="w")
    assert images.item() == 1  # as it is saved


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_a_picture_that_cannot_be_written_leaves_the_one_before(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_text("before")

    def save_half(image, target, **options):
        Path(target).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", save_half)
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(OSError, match="disk full"):
        save_png(grid(images), path) if name == "a.png" else save_animation(images, path, fps=6)
    assert path.read_text() == "before" and [file.name for file in tmp_path.iterdir()] == [name]


def test_images_as_files(tmp_path):
    grey = torch.tensor([[[[-1.0, 0.0], [1.0, 3.0]]]])
    assert np.array_equal(np.asarray(to_pil(grey[0])), [[0, 128], [255, 255]])
    assert grid(grey[:, :, :1, :1]).size == (1, 1)
    colour = grid(torch.zeros(3, 3, 2, 2), columns=2)
    assert colour.size == (4, 4) and colour.mode == "RGB"
    save_png(colour, tmp_path / "new" / "a.png", scale=3)
    assert Image.open(tmp_path / "new" / "a.png").size == (12, 12)
