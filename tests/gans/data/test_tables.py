"""Data sets of the library `datasets`: columns, splits, order, what is refused. Skipped where it is not installed."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from gans.commands.cli import main
from gans.data import loading
from gans.data.decoding import BrokenImageError
from gans.data.sources import open_source
from gans.evaluation.reference import digest
from tests.gans.data.test_shards import encoded


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


def table(datasets, count: int = 12, first: int = 0, **columns):
    """Images with the red value 20 * i and the label i % 3 of four classes."""
    numbers = range(first, first + count)
    kinds = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "eel", "fox"])}
    rows = {"img": [{"bytes": encoded(20 * i), "path": f"{i}.png"} for i in numbers], "label": [i % 3 for i in numbers]}
    kinds |= {name: kind for name, (kind, _) in columns.items()}
    rows |= {name: values for name, (_, values) in columns.items()}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


@pytest.fixture
def parquet(datasets, tmp_path) -> Path:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for part in range(3):
        table(datasets, 4, 4 * part).to_parquet(folder / f"train-{part:05d}-of-00003.parquet", batch_size=2)
    table(datasets, 2, 10).to_parquet(folder / "validation-00000-of-00001.parquet")
    (tmp_path / "set" / "README.md").write_text("about")
    return tmp_path / "set"


def reds(source) -> list[int]:
    return [source.open(i).getpixel((0, 0))[0] for i in range(len(source))]


def test_parquet_files(parquet):
    source = open_source(parquet)
    assert reds(source) == [20 * i for i in range(12)]
    assert source.labels == [i % 3 for i in range(12)]
    assert source.classes == ["cat", "dog", "eel", "fox"]  # as the column has them, with and without images
    assert reds(open_source(parquet, "validation")) == [200, 220]
    with pytest.raises(ValueError, match=r"split 'test' is not in .*set', which has train, validation"):
        open_source(parquet, "test")
    some = open_source(str(parquet / "data" / "train-{00002,00000}-of-00003.parquet"))
    assert reds(some) == [20 * i for i in (8, 9, 10, 11, 0, 1, 2, 3)]
    assert digest(source) == digest(open_source(parquet)) != digest(some)


def test_order_continues_from_any_position(parquet):
    """Of two processes, and with a worker."""

    def stream():
        return loading.Stream(open_source(parquet), size=8, channels=3, seed=3, flip=True)

    whole = torch.cat(list(itertools.islice(loading.batches(stream(), 4), 9)))
    for rank, processes, workers in ((0, 2, 0), (1, 2, 0), (0, 1, 1)):
        options = {"start": 8, "rank": rank, "processes": processes, "workers": workers}
        rest = torch.cat(list(itertools.islice(loading.batches(stream(), 4, **options), 7)))
        assert torch.equal(rest, whole[8:].view(7, processes, -1, 3, 8, 8)[:, rank].flatten(0, 1))


def test_saved_folders(datasets, tmp_path):
    table(datasets).save_to_disk(tmp_path / "one")
    assert reds(open_source(tmp_path / "one")) == [20 * i for i in range(12)]
    splits = datasets.DatasetDict({"train": table(datasets, 3), "odd": table(datasets, 2, 5)})
    splits.save_to_disk(tmp_path / "several")
    assert reds(open_source(tmp_path / "several", "odd")) == [100, 120]
    with pytest.raises(ValueError, match=r"split 'test' is not in .*several', which has train, odd"):
        open_source(tmp_path / "several", "test")


def test_a_bad_sample_is_named_by_file_and_row(datasets, parquet, capsys):
    bad = {"bytes": b"no image", "path": "7.png"}
    rows = {"image": [encoded(1), b"no image"], "label": ["b", "a"]}
    datasets.Dataset.from_dict(rows).to_parquet(parquet.parent / "other.parquet")  # bytes without a type
    data = str(parquet.parent / "other.parquet")
    source = open_source(data)
    assert source.labels == [1, 0] and source.classes == ["a", "b"]
    with pytest.raises(BrokenImageError, match=r"cannot read image in row 1 of '.*other\.parquet': Pillow knows no"):
        source.open(1)
    table(datasets, 1).map(lambda row: {"img": bad}).to_parquet(parquet / "data" / "train-00001-of-00003.parquet")
    assert main(["data", "--data", str(parquet)]) == 1
    assert "cannot read image in row 0 of" in (shown := capsys.readouterr().err) and "train-00001-of" in shown


def test_columns_that_are_refused(datasets, tmp_path):
    def saved(name, dataset):
        dataset.save_to_disk(tmp_path / name)
        return open_source(tmp_path / name)

    more = (datasets.Image(), [{"bytes": encoded(1), "path": None}] * 12)
    with pytest.raises(ValueError, match="has several columns of images, img, mask: call one of them 'image'"):
        saved("a", table(datasets, mask=more))
    assert len(saved("b", table(datasets, mask=more).rename_column("mask", "image"))) == 12
    with pytest.raises(ValueError, match="has no column of images; its columns are label"):
        saved("c", table(datasets).remove_columns("img"))
    kind = (datasets.ClassLabel(names=["x", "y"]), [0, 1] * 6)
    source = saved("d", table(datasets, kind=kind).rename_column("label", "sort"))
    assert source.open(0).size == (8, 8)
    with pytest.raises(ValueError, match="has several columns of labels, sort, kind: call one of them 'label'"):
        _ = source.labels
    assert saved("e", table(datasets, kind=kind)).classes[0] == "cat"
    assert saved("f", table(datasets).remove_columns("label")).labels is None
    hidden = (datasets.ClassLabel(names=["x", "y"]), [0] * 3 + [-1] * 9)  # as test splits have it
    with pytest.raises(
        ValueError, match=r"the label of the image in row 3 of '.*g' is -1; it must be a number or a name"
    ):
        _ = saved("g", table(datasets, label=hidden)).labels


def test_conversion_keeps_classes_without_images(parquet, tmp_path):
    for name, classes in (("x.zip", ["cat", "dog", "eel", "fox"]), ("x.tar", ["cat", "dog", "eel"])):
        assert main(["data", "--data", str(parquet), "--convert", str(tmp_path / name), "--size", "8"]) == 0
        source = open_source(tmp_path / name)
        assert source.labels == [i % 3 for i in range(12)] and source.classes == classes
        assert reds(source) == [20 * i for i in range(12)]


def test_files_that_are_not_parquet(datasets, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"data '.*x\.parquet' cannot be read: "):
        open_source(tmp_path / "x.parquet")


def test_parquet_of_other_programs(datasets, tmp_path):
    """A pair of bytes and path without the type Image; files without rows; files with other columns."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name, rows, **more):
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        files = [{"bytes": encoded(20 * i), "path": None} for i in range(rows)]
        parquet.write_table(pyarrow.table({"image": pyarrow.array(files, kind), **more}), tmp_path / name)

    write("a.parquet", 3, label=[0, 1, -1])
    source = open_source(tmp_path / "a.parquet")
    assert reds(source) == [0, 20, 40]
    with pytest.raises(ValueError, match=r"label of the image in row 2 of '.*a\.parquet' is -1"):
        _ = source.labels
    write("b.parquet", 0, label=pyarrow.array([], pyarrow.int64()))
    with pytest.raises(ValueError, match=r"b\.parquet' has no images"):
        open_source(tmp_path / "b.parquet")
    write("c.parquet", 1, text=["x"])
    message = r"^data '.*\*\.parquet' has files with different columns: image, label in '.*', and image, text in '.*'$"
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "*.parquet"))


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    for data in (str(tmp_path / "x.parquet"), "hf:user/name"):
        with pytest.raises(ValueError, match=r"data is .*, which needs the package datasets: pip install '\.\[data\]'"):
            open_source(data)
    with pytest.raises(ValueError, match="a data set of the hub is hf:NAME, hf:NAME:SUBSET or hf:NAME@REVISION"):
        open_source("hf:")
