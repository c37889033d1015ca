"""Labels, splits, CIFAR-10's archive, broken files, and the command that checks images."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import pickle
import shutil
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gans.commands.cli import main
from gans.data import file_images, loading
from gans.data.decoding import BrokenImageError
from gans.data.sources import open_source


def write_images(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    return root


def zipped(root: Path) -> Path:
    return Path(shutil.make_archive(str(root), "zip", root))


NAMES = ["train/dog/b.png", "train/cat/a.png", "train/cat/c.png", "test/dog/d.png"]


@pytest.mark.parametrize("packed", [False, True])
def test_folders_are_labels_and_top_folders_splits(tmp_path, packed):
    root = write_images(tmp_path / "pets", NAMES)
    root = zipped(root) if packed else root
    source = open_source(root)
    assert source.names == ["train/cat/a.png", "train/cat/c.png", "train/dog/b.png"]
    assert source.labels == [0, 0, 1] and source.classes == ["cat", "dog"]
    assert open_source(root, "test").names == ["test/dog/d.png"]
    assert open_source(root, "test").labels is None  # a single class is none
    with pytest.raises(ValueError, match=r"split 'val' is not in .*pets.*, which has test, train"):
        open_source(root, "val")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("style", ["csv", "jsonl", "stylegan"])
def test_metadata_files_are_labels(tmp_path, packed, style):
    root = write_images(tmp_path / "images", ["x/1.png", "x/2.png", "3.png"])
    table = {"x/1.png": 7, "x/2.png": 3, "3.png": 7}
    if style == "csv":
        lines = ["file_name,label", *(f"{name},{label}" for name, label in table.items())]
        (root / "metadata.csv").write_text("\n".join(lines))
    elif style == "jsonl":
        lines = [json.dumps({"file_name": name, "label": label}) for name, label in table.items()]
        (root / "metadata.jsonl").write_text("\n".join(lines))
    else:
        (root / "dataset.json").write_text(json.dumps({"labels": list(table.items())}))
    source = open_source(zipped(root) if packed else root)
    assert source.classes == ["3", "7"] and source.names == ["3.png", "x/1.png", "x/2.png"]
    assert source.labels == [1, 1, 0]


def test_bad_metadata(tmp_path):
    root = write_images(tmp_path / "images", ["1.png", "2.png"])
    (root / "metadata.csv").write_text("file_name,label\n1.png,a\n")
    with pytest.raises(ValueError, match=r"1 of 2 images of .* have no label in metadata\.csv, such as '2\.png'"):
        _ = open_source(root).labels
    (root / "metadata.csv").unlink()
    (root / "dataset.json").write_text('{"labels": [["1.png", [0.5, 1]], ["2.png", 0]]}')
    with pytest.raises(ValueError, match=r"label of '1\.png' in '.*images' is \[0\.5, 1\]"):
        _ = open_source(root).labels
    for broken in ("{", "[" * 100_000, '{"labels": [[1, 2]]}', "\N{SNOWMAN}"):
        (root / "dataset.json").write_text(broken, encoding="utf-16")
        with pytest.raises(ValueError, match=r"cannot read labels in 'dataset\.json'"):
            _ = open_source(root).labels


def test_labels_are_read_only_where_they_are_used(tmp_path, capsys):
    root = write_images(tmp_path / "images", ["train/a/1.png", "train/b/2.png", "test/a/3.png"])
    (root / "dataset.json").write_text('{"labels": [["train/a/1.png", 0]]}')
    source = open_source(root)
    assert loading.load_images(source, size=4, channels=3, limit=9).shape == (2, 3, 4, 4)
    assert main(["data", "--data", str(root)]) == 1
    shown = capsys.readouterr()
    assert "2 images\n  2 of 4x4 RGB" in shown.out
    assert "1 of 2 images of" in shown.err and "no label in dataset.json, such as 'train/b/2.png'" in shown.err
    # What is said of other splits does not matter.
    (root / "dataset.json").rename(root / "test" / "dataset.json")
    assert open_source(root).classes == ["a", "b"]


LITTER = ["._x.png", "a/._1.png", ".ipynb_checkpoints/z.png", "__MACOSX/a/1.png", "a/@eaDir/1.png/thumb.jpg", ".png"]


@pytest.mark.parametrize("packed", [False, True])
def test_what_systems_leave_beside_images_is_left_out(tmp_path, packed):
    root = write_images(tmp_path / ".cache" / "images", ["a/1.png", "a/2.png"])
    for name in (*LITTER, "Thumbs.db", "a/.DS_Store", "__MACOSX/metadata.csv", ".train/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image")
    source = open_source(zipped(root) if packed else root)
    assert source.names == ["a/1.png", "a/2.png"]
    assert source.labels is None and source.classes == []
    assert loading.load_images(source, size=4, channels=3, limit=9).shape == (2, 3, 4, 4)


def test_litter_alone_is_no_data(tmp_path):
    (tmp_path / "._x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="has no images"):
        open_source(tmp_path)


def test_links_are_followed_once(tmp_path):
    elsewhere = write_images(tmp_path / "elsewhere", ["x/1.png", "2.png"])
    root = write_images(tmp_path / "images", ["a/3.png"])
    (root / "b").symlink_to(elsewhere)
    (root / "c.png").symlink_to(elsewhere / "2.png")
    assert open_source(root).names == ["a/3.png", "b/2.png", "b/x/1.png", "c.png"]
    assert open_source(root).classes == ["", "a", "b", "x"]
    (root / "self").symlink_to(root)
    with pytest.raises(ValueError, match=r"has the folder '.*images' twice, as '\.' and 'self'"):
        open_source(root)
    (root / "self").unlink()
    (root / "d").symlink_to(elsewhere / "x")
    with pytest.raises(ValueError, match=r"has the folder '.*elsewhere/x' twice, as 'b/x' and 'd'"):
        open_source(root)


def test_links_to_nowhere_are_named(tmp_path):
    root = write_images(tmp_path / "images", ["a/1.png"])
    (root / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    source = open_source(root)  # an image that is not there is a broken one
    with pytest.raises(BrokenImageError, match=r"a/2\.png"):
        source.open(1)
    (root / "b").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"has a link 'b' that leads nowhere \('.*gone'\)"):
        open_source(root)
    shutil.rmtree(root)
    assert os.mkfifo(tmp_path / "pipe.png") is None and open_source(write_images(root, ["1.png"])).names == ["1.png"]


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
    root, scandir = write_images(tmp_path / "images", ["a/1.png", "b/2.png"]), os.scandir

    def denied(path):
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match=r"images/b"):
        open_source(root)


def test_links_in_archives_are_refused(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("b")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "../elsewhere")
        archive.writestr("1.png", b"")
    with pytest.raises(ValueError, match=r"images\.zip' has 1 links, such as 'b'"):
        open_source(path)


@pytest.mark.parametrize("packed", [False, True])
def test_sizes_are_checked_before_decoding(tmp_path, monkeypatch, packed):
    root = write_images(tmp_path / "images", ["3.png"])
    (root / "1.ppm").write_bytes(b"P5 8192 8193 255\n")  # a head without pixels
    (root / "2.png").write_bytes(bytes(1001))
    monkeypatch.setattr(file_images, "MAX_BYTES", 1000)
    source = open_source(zipped(root) if packed else root)
    with pytest.raises(BrokenImageError, match=r"'1\.ppm' .* it has 8192x8193 pixels; at most 67,108,864 are decoded"):
        source.open(0)
    monkeypatch.setattr(type(source), "read", None)  # what is too large is not even read
    with pytest.raises(BrokenImageError, match=r"'2\.png' .* it has 1,001 bytes without compression; at most 1,000"):
        source.open(1)


def test_an_archive_that_lies_about_sizes(tmp_path):
    """No more is unpacked than it says: 64 MiB of zeros that are given out as 100 bytes."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(2**26))
        archive.writestr("2.png", b"")
    content = path.read_bytes()
    assert content.count(struct.pack("<I", 2**26)) == 2
    path.write_bytes(content.replace(struct.pack("<I", 2**26), struct.pack("<I", 100)))
    source = open_source(path)
    tracemalloc.start()
    with pytest.raises(BrokenImageError, match=r"'1\.png'"):
        source.open(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_damaged_archives_are_named(folder, tmp_path):
    (folder / "dataset.json").write_text('{"labels": null}')
    path = zipped(folder)
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        damaged[draw.integers(len(whole), size=4)] = draw.integers(256, size=4)
        path.write_bytes(damaged.tobytes())
        try:
            source = open_source(path)
            assert source.labels is None or len(source.labels) == len(source)
            for i in range(len(source)):
                source.open(i)
        except ValueError as error:
            assert str(path) in str(error)


class Evil:
    def __reduce__(self):
        return print, ("the pickle ran code",)


def cifar_archive(path: Path, *, evil: bool = False) -> tuple[Path, np.ndarray]:
    """An archive as CIFAR-10's, with six images, and their pixels `(6, 32, 32, 3)`; the last is the test split."""
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    rows = images.transpose(0, 3, 1, 2).reshape(6, -1)
    parts = {"data_batch_1": slice(0, 2), "data_batch_2": slice(2, 5), "test_batch": slice(5, 6)}
    files = {
        name: {b"data": rows[part], b"labels": list(range(6))[part], b"batch_label": Evil() if evil else name.encode()}
        for name, part in parts.items()
    }
    files["batches.meta"] = {b"label_names": [f"class{i}".encode() for i in range(10)]}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            packed = pickle.dumps(content, protocol=2)
            info.size = len(packed)
            archive.addfile(info, io.BytesIO(packed))
    return path, images


def test_cifar10_archive_and_its_folder(tmp_path):
    path, images = cifar_archive(tmp_path / "cifar-10-python.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    for place in (path, tmp_path / "cifar-10-batches-py"):
        source = open_source(place)
        assert len(source) == 5 and source.labels == [0, 1, 2, 3, 4] and source.classes[3] == "class3"
        for i in range(5):
            assert np.array_equal(np.asarray(source.open(i)), images[i])
        test = open_source(place, "test")
        assert len(test) == 1 and np.array_equal(np.asarray(test.open(0)), images[5])
        with pytest.raises(ValueError, match="split is 'val'; CIFAR-10 has 'train' and 'test'"):
            open_source(place, "val")


def test_cifar10_with_workers(tmp_path):
    path, images = cifar_archive(tmp_path / "cifar-10-python.tar.gz")
    stream = loading.Stream(open_source(path), size=32, channels=3, seed=0, flip=False, shuffle=False)
    (batch,) = itertools.islice(loading.batches(stream, 5, workers=1), 1)
    assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), images[:5])


def test_archives_that_are_not_cifar10(tmp_path, capsys):
    path, _ = cifar_archive(tmp_path / "evil.tar.gz", evil=True)
    with pytest.raises(ValueError, match=r"evil\.tar\.gz' is not CIFAR-10's archive .*: it asks for .*print"):
        open_source(path)
    assert "ran code" not in capsys.readouterr().out
    (tmp_path / "broken.tar.gz").write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"broken\.tar\.gz' is not CIFAR-10's archive"):
        open_source(tmp_path / "broken.tar.gz")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="it has no data_batch_"):
        open_source(tmp_path / "other.tar.gz")


def test_broken_files_are_skipped_in_a_repeatable_order(folder, capfd):
    broken = "part1/deep/image04.png"
    (folder / broken).write_bytes(b"no image")
    stream = loading.Stream(open_source(folder), size=8, channels=3, seed=3, flip=False, broken="skip")
    order = torch.cat(list(itertools.islice(loading.batches(stream, 4), 6)))[:, 0, 0, 0] // 20
    # The same order with the next image in the place of the broken one.
    whole = [int(i) for epoch in (0, 1) for i in torch.randperm(12, generator=generator_of(3, epoch))]
    numbers = [int(Path(name).stem[-2:]) for name in open_source(folder).names]
    expected = [numbers[whole[p] if numbers[whole[p]] != 4 else whole[p - p % 12 + (p + 1) % 12]] for p in range(24)]
    assert order.tolist() == expected
    shown = capfd.readouterr().err
    assert f"skipped: cannot read image {broken!r} in {str(folder)!r}: Pillow knows no such format" in shown


def generator_of(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def test_nothing_readable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    stream = loading.Stream(open_source(tmp_path), size=8, channels=3, seed=0, flip=False, broken="skip")
    with pytest.raises(BrokenImageError, match="none of the 1 images can be read"):
        stream[0]


def test_data_command(folder, capsys):
    assert main(["data", "--data", str(folder)]) == 0
    assert "12 images\n  12 of 8x8 RGB" in capsys.readouterr().out
    for name in ("part1/deep/image04.png", "part2/deep/image05.bmp"):
        (folder / name).write_bytes(b"")
    assert main(["data", "--data", str(folder)]) == 1
    shown = capsys.readouterr()
    assert "10 of 8x8 RGB" in shown.out
    assert "2 files cannot be read:" in shown.err and "'part2/deep/image05.bmp'" in shown.err
    assert main(["data", "--data", "digits"]) == 0
    assert "10 classes: 0, 1, 2" in capsys.readouterr().out


def test_batches_of_processes_and_sizes(folder):
    """Sizes in turn; two processes get the halves of what one gets."""
    stream = loading.Stream(open_source(folder), size=8, channels=3, seed=0, flip=False)
    whole = list(itertools.islice(loading.batches(stream, [4, 2]), 4))
    assert [len(batch) for batch in whole] == [4, 2, 4, 2]
    shares = [list(itertools.islice(loading.batches(stream, [4, 2], rank=r, processes=2), 4)) for r in range(2)]
    for together, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(together, torch.cat([first, second]))
