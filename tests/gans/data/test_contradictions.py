"""Data that contradict themselves, or stand for other images than they seem to: refused, with the names of both."""

from __future__ import annotations

import json
import re
import zipfile

import pytest

from gans.commands.cli import main
from gans.data.packing import check_destination
from gans.data.sources import open_source
from tests.gans.data.test_shards import encoded, write_tar
from tests.gans.data.test_sources import write_images


def test_files_of_no_split_beside_files_of_one(tmp_path):
    """A file that is named itself is not left out."""
    for name in ("train-0.tar", "train-1.tar", "ok-0.tar"):
        write_tar(tmp_path / name, {"0.png": encoded(1)})
    with pytest.raises(ValueError, match=r"has files of splits \(train\) and 1 of none by their names: '?.*ok-0\.tar;"):
        open_source(str(tmp_path / "{ok,train}-0.tar"))
    assert len(open_source(str(tmp_path / "*.tar"))) == len(open_source(tmp_path)) == 2
    assert len(open_source(str(tmp_path / "ok-0.tar"))) == 1


def test_a_pattern_names_each_file_once(tmp_path):
    """For reading, and for writing, where one image file would replace the other."""
    write_tar(tmp_path / "x-1.tar", {"0.png": encoded(1)})
    for pattern in ("x-{1,1}.tar", "{x-*,x-1}.tar", "{.,./.}/x-1.tar"):
        with pytest.raises(ValueError, match=r"stands for '.*x-1\.tar' twice; name each file once"):
            open_source(str(tmp_path) + "/" + pattern)
    out = tmp_path / "out"
    assert main(["data", "--data", str(tmp_path), "--convert", f"{out}/y-{{1,1}}.tar", "--size", "4"]) == 1
    assert not out.exists()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"stands for '.*link/y\.tar' twice"):
        check_destination(str(tmp_path) + "/{.,link}/y.tar")


def members(*about: dict | bytes) -> dict[str, bytes]:
    """Images with labels beside them: a number in KEY.cls, or KEY.json."""
    files = {}
    for i, each in enumerate(about):
        files[f"{i}.png"] = encoded(i)
        files[f"{i}.cls" if isinstance(each, bytes) else f"{i}.json"] = (
            each if isinstance(each, bytes) else json.dumps(each).encode()
        )
    return files


NUMBER_AND_NAME = r"label of '0\.png' of .* is 'cat', and that of '1\.png' of shard .* is 3; all must be numbers"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (
            [b"0", b" -1\n"],
            r"label of '1\.png' of shard '.*x\.tar' is -1; it must be a number or a name, and -1 stands",
        ),
        ([{"label": 0}, {"label": -1}], r"label of '1\.png' of shard '.*' is -1"),
        ([{"label": "cat"}, {"label": 3}], NUMBER_AND_NAME),
        (
            [{"label": 1, "class_name": "cat"}, {"label": 1, "class_name": "dog"}],
            r"class 1 is called 'cat' by '0\.json' of shard '.*', and 'dog' by '1\.json' of shard",
        ),
        (
            [{"label": 0, "class_name": "dog"}, {"label": 1, "class_name": "dog"}],
            r"the name 'dog' is class 0's by '0\.json' of shard '.*', and class 1's by '1\.json' of shard",
        ),
    ],
)
def test_labels_that_contradict_beside_images(tmp_path, about, message):
    source = open_source(write_tar(tmp_path / "x.tar", members(*about)))
    with pytest.raises(ValueError, match=message):
        _ = source.labels


def test_two_members_that_contradict_on_a_label(tmp_path):
    """A name in KEY.json goes before a number in KEY.cls."""
    same = members({"label": 1}, {"label": 0}) | {"0.cls": b"1", "1.cls": b"0"}
    assert open_source(write_tar(tmp_path / "x.tar", same)).labels == [1, 0]
    named = members({"label": "b"}, {"label": "a"}) | {"0.cls": b"0", "1.cls": b"1"}
    assert open_source(write_tar(tmp_path / "y.tar", named)).labels == [1, 0]
    source = open_source(write_tar(tmp_path / "z.tar", same | {"1.cls": b"2"}))
    message = r"the label is 0 by '1\.json' of shard '.*z\.tar', and 2 by '1\.cls' of shard '.*z\.tar'; they must agree"
    with pytest.raises(ValueError, match=message):
        _ = source.labels


def test_labels_that_contradict_in_tables(tmp_path):
    root = write_images(tmp_path / "images", ["a/1.png", "b/2.png"])
    tables = {
        r"label of 'b/2\.png' in '.*images' is -1": {"labels": [["a/1.png", 0], ["b/2.png", -1]]},
        r"of 'a/1\.png' .* is 0, and that of 'b/2\.png' .* is 'cat'": {"labels": [["a/1.png", 0], ["b/2.png", "cat"]]},
        r"the name 'x' is class 0's by 'dataset\.json' .*, and class 1's": {
            "labels": [["a/1.png", 0], ["b/2.png", 1]],
            "classes": ["x", "x"],
        },
        r"'a/1\.png' .* is 'x', and 'x' is the name of a number": {
            "labels": [["a/1.png", "x"], ["b/2.png", "y"]],
            "classes": ["x", "y"],
        },
    }
    for message, table in tables.items():
        (root / "dataset.json").write_text(json.dumps(table))
        with pytest.raises(ValueError, match=message):
            _ = open_source(root).labels
    (root / "dataset.json").unlink()
    for folder, image, names in (("a", "1.png", ["x", "y"]), ("b", "2.png", ["y", "x"])):
        (root / folder / "dataset.json").write_text(json.dumps({"labels": [[image, 0]], "classes": names}))
    with pytest.raises(
        ValueError, match=r"class 0 is called 'x' by 'a/dataset\.json' .*, and 'y' by 'b/dataset\.json'"
    ):
        _ = open_source(root).labels
    for folder in "ab":
        (root / folder / "dataset.json").unlink()
    (root / "metadata.csv").write_text("file_name,label\na/1.png,1\nb/2.png,-1\n")
    with pytest.raises(ValueError, match=r"label of 'b/2\.png' in '.*images' is '-1'"):
        _ = open_source(root).labels


def test_joined_archives(tmp_path):
    """`cat` of two: tarfile reads the first alone. Zeros may follow, as tar pads."""
    one, path = write_tar(tmp_path / "one.tar", {"0.png": encoded(0)}).read_bytes(), tmp_path / "x.tar"
    for content in (one + one, one.rstrip(b"\0") + bytes(3 * 2**20) + one):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.tar' cannot be read .*: it goes on after its end mark at byte [1-9]"):
            open_source(path)
    path.write_bytes(one + bytes(3 * 2**20))
    assert len(open_source(path)) == 1


@pytest.mark.parametrize("name", ["../1.png", "/1.png", "a/../1.png"])
def test_members_that_lead_out(tmp_path, name):
    with pytest.raises(ValueError, match=rf"has a member that leads out of it, {re.escape(repr(name))}"):
        open_source(write_tar(tmp_path / "x.tar", {"0.png": encoded(0), name: encoded(1)}))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("0.png", encoded(0))
        archive.writestr(name, encoded(1))
    with pytest.raises(ValueError, match=rf"has a member that leads out of it, {re.escape(repr(name))}"):
        open_source(tmp_path / "x.zip")
