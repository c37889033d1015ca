from __future__ import annotations

import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gans.data import loading
from gans.data.sources import open_source


def make_zip(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def reds(images: torch.Tensor) -> list[int]:
    """Which of the folder's images these are."""
    return (images[:, 0, 0, 0].int() // 20).tolist()


def stream(source, **options):
    return loading.Stream(source, **({"size": 8, "channels": 3, "seed": 0, "flip": False} | options))


@pytest.mark.parametrize("packed", [False, True])
def test_folder_and_zip_find_every_image(folder, tmp_path, packed):
    source = open_source(make_zip(folder, tmp_path / "images.zip") if packed else folder)
    images = loading.load_images(source, size=8, channels=3, limit=100)
    assert images.shape == (12, 3, 8, 8) and images.dtype == torch.float32
    assert sorted(((images[:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist()) == list(range(12))
    assert torch.all(images[:, 1:] == -1)


def test_every_epoch_is_another_permutation(folder):
    endless = loading.batches(stream(open_source(folder)), 4)
    order = reds(torch.cat(list(itertools.islice(endless, 9))))
    epochs = [order[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_order_continues_from_any_position_with_any_workers(folder, tmp_path, workers):
    source = open_source(make_zip(folder, tmp_path / "images.zip"))
    whole = torch.cat(list(itertools.islice(loading.batches(stream(source, flip=True), 5), 6)))
    state = torch.get_rng_state()
    rest = loading.batches(stream(source, flip=True), 5, start=10, workers=workers)
    assert torch.equal(torch.cat(list(itertools.islice(rest, 4))), whole[10:])
    assert torch.equal(state, torch.get_rng_state())


def test_flips_are_fair_and_mirror(tmp_path):
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:, 4:] = 255
    Image.fromarray(half).save(tmp_path / "a.png")
    source = open_source(tmp_path)
    images = torch.stack([stream(source, channels=1, flip=True)[i] for i in range(300)])
    left = images[:, 0, 0, 0] == 255
    assert 110 < int(left.sum()) < 190
    assert torch.equal(images[left][0], torch.from_numpy(half[None, :, ::-1].copy()))
    assert not any((stream(source, channels=1)[i] != torch.from_numpy(half)).any() for i in range(50))


def test_resizing_rule():
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    out = loading.to_array(Image.fromarray(wide), 10, 3)
    assert (out == 200).all()  # the centre square, untouched
    assert loading.to_array(Image.fromarray(wide), 5, 3).shape == (3, 5, 5)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    shrunk = loading.to_array(Image.fromarray(noise), 4, 3)
    assert shrunk.std() < 20  # antialiased: noise averages out


def test_transparency_grey_palette_and_16_bit():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (loading.to_array(clear, 4, 3) == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert abs(int(loading.to_array(half, 4, 3)[0, 0, 0]) - 127) <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    assert (loading.to_array(palette, 4, 3) == 255).all()
    deep = Image.fromarray(np.full((4, 4), 128 * 256, dtype=np.uint16))
    assert (loading.to_array(deep, 4, 1) == 128).all()
    assert loading.to_array(Image.new("L", (4, 4), 7), 4, 3).tolist() == np.full((3, 4, 4), 7).tolist()
    assert loading.to_array(Image.new("CMYK", (4, 4)), 4, 3).shape == (3, 4, 4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_broken_files_are_named(folder, tmp_path, packed, damage):
    victim = folder / "part1" / "deep" / "image04.png"
    content = victim.read_bytes()
    victim.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"no image", "empty": b""}[damage])
    source = open_source(make_zip(folder, tmp_path / "images.zip") if packed else folder)
    with pytest.raises(ValueError, match=r"part1/deep/image04\.png"):
        loading.load_images(source, size=8, channels=3, limit=100)


def test_errors_of_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(tmp_path / "missing")
    with pytest.raises(ValueError, match="has no images"):
        open_source(tmp_path)
    (tmp_path / "fake.zip").write_text("no zip")
    with pytest.raises(ValueError, match=r"fake\.zip' is not a readable ZIP"):
        open_source(tmp_path / "fake.zip")
    with pytest.raises(ValueError, match="workers is -1"):
        loading.DataConfig(workers=-1)


def test_digits():
    source = open_source("digits")
    assert len(source) == 1797
    images = loading.load_images(source, size=16, channels=1, limit=50)
    assert images.shape == (50, 1, 16, 16)
    assert images.min() == -1 and images.max() > 0.9
