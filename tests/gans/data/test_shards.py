"""WebDataset shards: labels, splits, exact order with and without interruption, what is refused; images packed."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gans.commands.cli import main
from gans.commands.train import next_folder
from gans.data import loading
from gans.data.decoding import BrokenImageError
from gans.data.sources import expand, open_source
from gans.evaluation.reference import digest
from gans.recipes.config import RunConfig
from gans.training import checkpoint
from gans.training.loop import train


def encoded(value: int, kind: str = "PNG", size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes], *, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path) -> str:
    """Twelve images with the red value 20 * i and the label i % 3 in three shards."""
    for shard in range(3):
        files = {}
        for i in range(4 * shard, 4 * shard + 4):
            files |= {f"s{i:02d}.png": encoded(20 * i), f"s{i:02d}.cls": b"%d" % (i % 3)}
        write_tar(tmp_path / "shards" / f"x-{shard:03d}.tar", files)
    return str(tmp_path / "shards" / "x-{000..002}.tar")


def stream(data: str, **options) -> loading.Stream:
    return loading.Stream(open_source(data), size=8, channels=3, seed=3, flip=True, **options)


def test_names_labels_and_images(shards):
    source = open_source(shards)
    assert source.names == [f"x-{i // 4:03d}.tar/s{i:02d}.png" for i in range(12)]
    assert source.labels == [i % 3 for i in range(12)] and source.classes == ["0", "1", "2"]
    assert [source.open(i).getpixel((0, 0))[0] for i in range(12)] == [20 * i for i in range(12)]
    folder = str(Path(shards).parent)
    for data in (folder, folder + "/*.tar", folder + "/x-{000,001,002}.tar"):
        assert open_source(data).names == source.names
    assert open_source(folder + "/x-001.tar").names == source.names[4:8]
    assert digest(source) == digest(open_source(folder)) != digest(open_source(folder + "/x-001.tar"))


@pytest.mark.parametrize(("processes", "workers"), [(2, 0), (1, 1)])
def test_order_continues_from_any_position(shards, folder, processes, workers):
    """What any process reads from any position on is its share of what one reads from the start."""
    whole = torch.cat(list(itertools.islice(loading.batches(stream(shards), 4), 9)))
    assert torch.equal(whole, torch.cat(list(itertools.islice(loading.batches(stream(folder), 4), 9))))  # as a folder
    for rank in range(processes):
        options = {"start": 8, "rank": rank, "processes": processes, "workers": workers}
        rest = torch.cat(list(itertools.islice(loading.batches(stream(shards), 4, **options), 7)))
        assert torch.equal(rest, whole[8:].view(7, processes, -1, 3, 8, 8)[:, rank].flatten(0, 1))


@pytest.fixture
def folder(shards, tmp_path) -> str:
    """The same images as files."""
    source = open_source(shards)
    (tmp_path / "folder").mkdir()
    for i in range(12):
        source.open(i).save(tmp_path / "folder" / f"{i:02d}.png")
    return str(tmp_path / "folder")


def test_a_resumed_run_sees_the_same_images(shards, tiny, tiny_run, tmp_path):
    """Bit for bit, with classes."""
    parts = {"classes": 3, "channels": 3}
    recipe = replace(
        tiny, generator=replace(tiny.generator, **parts), discriminator=replace(tiny.discriminator, **parts), steps=3
    )
    run = replace(tiny_run, data=shards, sample_every=9)
    whole = train(recipe, run, progress=False)
    other = replace(run, out=str(tmp_path / "parts"))
    train(replace(recipe, steps=1), other, progress=False)
    second = train(recipe, replace(other, resume="latest"), progress=False)
    assert json.loads((second / "config.json").read_text())["classes"] == ["0", "1", "2"]
    for name in ("generator", "discriminator"):
        one, two = (checkpoint.load_tensors(path, name) for path in (whole, second))
        assert all(torch.equal(one[key], two[key]) for key in one)


def labels_of(path: Path) -> tuple[list[int] | None, list[str]]:
    source = open_source(path)
    return source.labels, source.classes


def test_labels_beside_images(tmp_path):
    image = encoded(1)
    about = [{"label": 7, "class_name": "dog"}, {"label": 3, "class_name": "cat"}]
    files = {f"{i}.{kind}": c for i, a in enumerate(about) for kind, c in (("jpg", image), ("json", json.dumps(a)))}
    files = {name: c if isinstance(c, bytes) else c.encode() for name, c in files.items()}
    assert labels_of(write_tar(tmp_path / "a.tar", files)) == ([1, 0], ["cat", "dog"])
    names = {"0.png": image, "0.json": b'{"label": "b"}', "1.png": image, "1.json": b'{"label": "a"}'}
    assert labels_of(write_tar(tmp_path / "b.tar", names)) == ([1, 0], ["a", "b"])
    # What else may stand in JSON is no label; folders then are.
    captions = {"x/0.png": image, "x/0.json": b'{"caption": "?"}', "y/1.png": image, "y/1.json": b"[]"}
    assert labels_of(write_tar(tmp_path / "c.tar", captions)) == ([0, 1], ["x", "y"])
    assert labels_of(write_tar(tmp_path / "d.tar", {"0.png": image, "1.png": image})) == (None, [])
    table = {"0.png": image, "1.png": image, "dataset.json": b'{"labels": [["0.png", 1], ["1.png", 0]]}'}
    assert labels_of(write_tar(tmp_path / "e.tar", table)) == ([1, 0], ["0", "1"])


def test_null_in_json_is_no_label(tmp_path):
    """KEY.cls has it then, else the folder; null is no name of a class either."""
    images = {"x/0.png": encoded(0), "y/1.png": encoded(1)}
    null = {"x/0.json": b'{"label": null, "class_name": "cat"}', "y/1.json": b'{"label": null, "class_name": null}'}
    assert labels_of(write_tar(tmp_path / "a.tar", images | null)) == ([0, 1], ["x", "y"])
    numbers = {"x/0.cls": b"7", "y/1.cls": b"3"}
    assert labels_of(write_tar(tmp_path / "b.tar", images | null | numbers)) == ([1, 0], ["3", "cat"])
    one = {"x/0.json": b'{"label": 7}', "y/1.json": null["y/1.json"], "y/1.cls": b"3"}
    assert labels_of(write_tar(tmp_path / "c.tar", images | one)) == ([1, 0], ["3", "7"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.cls": b"cat"}, r"cannot read the label '0\.cls' of shard '.*bad\.tar': ValueError\(.*'cat'"),
        ({"0.json": b"{"}, r"cannot read the label '0\.json' of shard '.*bad\.tar': JSONDecodeError"),
        (
            {"0.json": b'{"label": [1]}', "1.cls": b"0"},
            r"label of '0\.png' of shard '.*bad\.tar' is \[1\]; it must be a number or a na",
        ),
        ({"0.cls": b"1"}, r"1 of 2 images of '.*bad\.tar' have no label beside them, such as 'bad\.tar/1\.png'"),
    ],
)
def test_bad_labels_are_named_where_they_are_used(tmp_path, files, message):
    source = open_source(write_tar(tmp_path / "bad.tar", {"0.png": encoded(1), "1.png": encoded(2)} | files))
    assert source.open(0).size == (8, 8)
    with pytest.raises(ValueError, match=message):
        _ = source.labels


def test_splits_are_words_of_names(tmp_path):
    for name in ("pets-train-0.tar", "pets-train-1.tar", "val/pets-0.tar", "testing-0.tar"):
        write_tar(tmp_path / name, {"0.png": encoded(1), "1.png": encoded(2)})
    assert {name.rpartition("/")[0] for name in open_source(tmp_path).names} == {"pets-train-0.tar", "pets-train-1.tar"}
    assert [name.rpartition("/")[0] for name in open_source(tmp_path, "val").names] == ["pets-0.tar"] * 2
    with pytest.raises(ValueError, match=r"split 'test' is not in .*, which has train, val"):
        open_source(tmp_path, "test")
    with pytest.raises(ValueError, match=r"split 'test' is not in .*, which has no splits"):
        open_source(tmp_path / "testing-0.tar", "test")


def test_a_bad_sample_is_named_by_shard_and_key(tmp_path, capsys):
    path = write_tar(tmp_path / "x-0.tar", {"a/b.png": encoded(1), "a/c.jpg": b"no image"})
    source = open_source(path)
    with pytest.raises(BrokenImageError, match=r"cannot read image 'a/c\.jpg' of shard '.*x-0\.tar': Pillow knows no"):
        source.open(1)
    assert main(["data", "--data", str(path)]) == 1
    assert "1 file cannot be read:\ncannot read image 'a/c.jpg' of shard" in capsys.readouterr().err
    images = loading.load_images(source, size=8, channels=3, limit=2, broken="skip")
    assert torch.equal(images[0], images[1])


def test_shards_that_are_refused(tmp_path):
    good = {f"{i}.png": encoded(i) for i in range(4)}
    path = write_tar(tmp_path / "x.tar", good)
    whole = path.read_bytes()
    second = whole.index(b"1.png")
    third = whole.index(b"2.png")
    damaged = {
        "unexpected end of data": whole[: second + 530],  # within a member
        f"has no tar head nor end mark at byte {second:,}": whole[:second],  # between two
        f"has no tar head nor end mark at byte {third:,}": whole[:third] + b"x" + whole[third + 1 :],
        "invalid header|bad checksum|truncated header": b"no archive" * 100,
        "empty": b"",
    }
    for message, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"shard '.*x\.tar' cannot be read as a tar file without .*({message})"):
            open_source(path)
    with pytest.raises(ValueError, match=r"two images of one sample .* 'a/1\.left\.png' and 'a/1\.right\.png'"):
        open_source(write_tar(path, {"a/1.right.png": encoded(1), "a/1.left.png": encoded(1), "1.png": encoded(1)}))
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(ValueError, match=r"x\.tar' has '1\.png' twice"):
        open_source(path)
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "2.png"
        archive.addfile(link)
    with pytest.raises(ValueError, match=r"it has a link, '1\.png', in the place of the contents"):
        open_source(path)
    with pytest.raises(ValueError, match="has no images"):
        open_source(write_tar(path, {"1.txt": b""}))
    with pytest.raises(ValueError, match="is not CIFAR-10's archive"):
        open_source(write_tar(tmp_path / "x.tar.gz", good, mode="w:gz"))


def test_places_that_are_refused(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"are 5 files, of which 2 do not exist, such as '.*x-003\.tar'"):
        open_source(shards.replace("002", "004"))
    with pytest.raises(FileNotFoundError, match=r"y-\*\.tar' does not exist; give a folder, a ZIP file, shards"):
        open_source(shards.replace("x-{000..002}", "y-*"))
    for place in ("https://example.org/x-{0..9}.tar", "pipe:cat x.tar"):
        with pytest.raises(ValueError, match=r"images are read from local files \(copy it to one\) or from hf:NAME"):
            open_source(place)
    (tmp_path / "shards" / "1.png").write_bytes(encoded(1))
    with pytest.raises(ValueError, match=r"has both image files and 'x-000\.tar': .* such as '.*shards/\*\.tar'"):
        open_source(tmp_path / "shards")
    with pytest.raises(ValueError, match=r"are 2 files; several must all be shards \(\.tar\) or \.parquet"):
        open_source(str(tmp_path / "shards" / "{x-000.tar,1.png}"))
    with pytest.raises(ValueError, match=r"'x-\{3\.\.1\}\.tar' counts from 3 to 1"):
        expand("x-{3..1}.tar")


def test_patterns():
    assert expand("a-{08..11}-{x,y}") == [f"a-{i}-{k}" for i in ("08", "09", "10", "11") for k in "xy"]
    assert expand("{8..10}") == ["8", "9", "10"] and expand("{a}b{}") == ["{a}b{}"]
    names = {"s/x-{000..9}.tar": "x", "hf:user/name": "name", "a/b.tar.gz": "b", "photos/": "photos", "*.tar": "data"}
    for data, name in names.items():
        assert next_folder(Path("runs"), "p", RunConfig(data=data, out="")).name == f"00000-p-{name}"


def test_webdataset_reads_and_writes_the_same(shards, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=2, verbose=0) as sink:
        for i in range(4):
            sink.write({"__key__": f"k/{i}", "jpg": encoded(i, "JPEG"), "cls": i % 2})
    source = open_source(str(tmp_path / "w-{000..001}.tar"))
    assert source.names[2] == "w-001.tar/k/2.jpg" and source.labels == [0, 1, 0, 1]
    assert main(["data", "--data", shards, "--convert", str(tmp_path / "o-{0..1}.tar"), "--size", "4"]) == 0
    read = (
        webdataset.WebDataset(str(tmp_path / "o-{0..1}.tar"), shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    )
    found = list(read)
    assert [label for _, label in found] == [i % 3 for i in range(12)]
    assert [int(image[0, 0, 0]) for image, _ in found] == [20 * i for i in range(12)]


@pytest.mark.parametrize("name", ["out.zip", "out-{0..4}.tar"])
@pytest.mark.parametrize("labelled", [True, False])
def test_images_are_packed_with_their_labels(tmp_path, name, labelled, capsys):
    """In their order, at the model's size."""
    root = tmp_path / "images"
    draw = np.random.default_rng(0)
    for i in range(7):
        path = root / (["c", "a"][i % 2] if labelled else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)
    command = ["data", "--data", str(root), "--convert", str(tmp_path / name), "--size", "8"]
    assert main(command) == 0
    about = "2 classes" if labelled else "no labels"
    assert f"wrote {tmp_path / name}: 7 images of 8x8, {about}" in capsys.readouterr().out
    before, after = open_source(root), open_source(str(tmp_path / name))
    assert after.labels == before.labels and after.classes == before.classes == (["a", "c"] if labelled else [])
    one, two = (loading.load_images(source, size=8, channels=3, limit=9) for source in (before, after))
    assert torch.equal(one, two) and after.open(0).size == (8, 8)
    assert main(command) == 1 and "exists; give another name" in capsys.readouterr().err


def test_a_zip_is_as_stylegan3_reads_it(tmp_path):
    """File names, labels as numbers in `dataset.json`; a StyleGAN archive without labels has none."""
    data = write_tar(tmp_path / "x.tar", {f"{i}.png": encoded(i) for i in range(3)} | {f"{i}.cls": b"4" for i in "01"})
    with pytest.raises(ValueError, match="have no label beside them"):
        _ = open_source(data).labels
    write_tar(data, {f"{i}.png": encoded(i) for i in range(3)} | {f"{i}.cls": b"%d" % (4 + i) for i in range(3)})
    assert (
        main(["data", "--data", str(data), "--convert", str(tmp_path / "x.zip"), "--size", "4", "--channels", "1"]) == 0
    )
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        names = [f"00000/img{i:08d}.png" for i in range(3)]
        assert archive.namelist() == [*names, "dataset.json"]
        table = json.loads(archive.read("dataset.json"))
        assert table == {"labels": [[name, i] for i, name in enumerate(names)], "classes": ["4", "5", "6"]}
        assert Image.open(archive.open(names[0])).mode == "L"
    table |= {"labels": table["labels"][:2] + [[names[2], 0]], "classes": ["d", "c", "b", "a"]}
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, encoded(i))
        archive.writestr("dataset.json", json.dumps(table))
    assert labels_of(tmp_path / "y.zip") == (
        [0, 1, 0],
        ["d", "c", "b", "a"],
    )  # the table's order, and all of its classes
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("00000/0.png", encoded(0))
        archive.writestr("00001/1.png", encoded(0))
        archive.writestr("dataset.json", '{"labels": null}')
    assert labels_of(tmp_path / "z.zip") == (None, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--convert", "x.7z", "--size", "8"], r"convert is 'x\.7z'; it must be one ZIP file, NAME\.zip, or shards"),
        (["--convert", "{a,b}.zip", "--size", "8"], r"convert is '\{a,b\}\.zip'; it must be one ZIP file"),
        (["--convert", "x.zip"], "size is 0; it must be at least 1"),
        (["--size", "8"], "size is 8; it goes with convert"),
        (["--convert", "x.zip", "--size", "8", "--channels", "2"], "channels is 2; it must be 1 or 3"),
        (["--convert", "x.zip", "--size", "8", "--workers", "-1"], "workers is -1; it cannot be negative"),
    ],
)
def test_bad_options(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        assert main(["data", "--data", "digits", *options]) == 1
    except SystemExit as error:  # of values that do not go together
        assert error.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path):
    data = write_tar(tmp_path / "in" / "x.tar", {"0.png": encoded(0), "1.png": b""})
    for name in ("out.zip", "out-{0..1}.tar"):
        assert main(["data", "--data", str(data), "--convert", str(tmp_path / name), "--size", "8"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
