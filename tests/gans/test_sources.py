"""Labels, splits, CIFAR-10's archive, broken files, and the command that checks images."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gans import data
from gans.cli import main
from gans.sources import BrokenImageError, open_source


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
    with pytest.raises(ValueError, match=r"1 images of .* have no label, such as '2\.png'"):
        open_source(root)
    (root / "metadata.csv").unlink()
    (root / "dataset.json").write_text('{"labels": [["1.png", [0.5, 1]]]}')
    with pytest.raises(ValueError, match=r"label of '1\.png' in 'dataset\.json' is \[0\.5, 1\]"):
        open_source(root)
    (root / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read labels in 'dataset\.json'"):
        open_source(root)


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
    stream = data.Stream(open_source(path), size=32, channels=3, seed=0, flip=False, shuffle=False)
    (batch,) = itertools.islice(data.batches(stream, 5, workers=1), 1)
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
    stream = data.Stream(open_source(folder), size=8, channels=3, seed=3, flip=False, broken="skip")
    order = torch.cat(list(itertools.islice(data.batches(stream, 4), 6)))[:, 0, 0, 0] // 20
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
    stream = data.Stream(open_source(tmp_path), size=8, channels=3, seed=0, flip=False, broken="skip")
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
    stream = data.Stream(open_source(folder), size=8, channels=3, seed=0, flip=False)
    whole = list(itertools.islice(data.batches(stream, [4, 2]), 4))
    assert [len(batch) for batch in whole] == [4, 2, 4, 2]
    shares = [list(itertools.islice(data.batches(stream, [4, 2], rank=r, processes=2), 4)) for r in range(2)]
    for together, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(together, torch.cat([first, second]))
