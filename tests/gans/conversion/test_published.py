"""Reading published files: options of unknown libraries are passed over, and code is refused, never run."""

from __future__ import annotations

import argparse
import builtins
import collections
import functools
import importlib
import os
import pathlib
import runpy
import subprocess
import sys
import types
import typing

import numpy as np
import pytest
import torch

from gans.conversion.published import read_published

LIBRARY = '''
class Metadata:
    def __init__(self, owner):
        self.type, self.owner, self.empty = typing.Any, owner, collections.defaultdict(dict)

class Options(dict):
    """Items and attributes, one of which refers back."""
    def __init__(self, *arguments, **values):
        super().__init__(*arguments, **values)
        self.__dict__["metadata"] = Metadata(self)

class State:
    def __setstate__(self, state):
        raise AssertionError("code of the library ran")

class Slots:
    __slots__ = ("a",)

def run(command):
    raise AssertionError("code of the library ran")
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Modules to pickle objects of; afterwards they cannot be imported without failing."""
    monkeypatch.syspath_prepend(tmp_path / "lib")
    (tmp_path / "lib").mkdir()
    source = tmp_path / "lib" / "options_library.py"
    source.write_text("import collections, typing\n" + LIBRARY)
    yield importlib.import_module("options_library")
    sys.modules.pop("options_library", None)


@pytest.fixture
def reread(tmp_path, library):
    """What `read_published` makes of something that torch.save has written where there was a library."""

    def read(content, **options):
        torch.save(content, tmp_path / "file.pt", **options)
        del sys.modules["options_library"]
        (tmp_path / "lib" / "options_library.py").write_text("raise AssertionError('imported')")
        return read_published(tmp_path / "file.pt")

    return read


def test_options_of_an_unknown_library_are_passed_over(library, reread):
    options = library.Options(a=1, b=[library.Options(c="x"), library.Metadata(None)], path=pathlib.PurePath("x").parts)
    content = reread({"args": options, "w": torch.arange(3), "fid": np.float64(2.05)})
    assert content["w"].tolist() == [0, 1, 2] and content["fid"] == 2.05
    assert type(content["args"]) is collections.OrderedDict and content["args"]["a"] == 1
    assert "options_library" not in sys.modules


@pytest.mark.parametrize(
    "options",
    [
        argparse.Namespace(lr=1e-3, out=pathlib.PosixPath("runs/a"), dtype=np.dtype("float32")),
        types.SimpleNamespace(lr=1e-3),
        collections.defaultdict(list, a=[1]),
        {"kind": int, "any": typing.Any},
    ],
    ids=lambda options: type(options).__name__,
)
def test_harmless_options_of_the_standard_library(options, tmp_path):
    torch.save({"args": options, "w": torch.arange(3)}, tmp_path / "file.pt")
    assert read_published(tmp_path / "file.pt")["w"].tolist() == [0, 1, 2]


class Call:
    """Pickled, it calls something."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


ATTACKS = {
    "system": (Call(os.system, "touch pwned"), "posix.system"),
    "eval": (Call(builtins.eval, "open('pwned', 'w')"), "builtins.eval"),
    "exec": (Call(builtins.exec, "open('pwned', 'w')"), "builtins.exec"),
    "popen": (Call(subprocess.Popen, ["touch", "pwned"]), "Popen"),
    "getattr": (Call(getattr, Call(__import__, "os"), "system"), "builtins.__import__, builtins.getattr"),
    "partial": (Call(functools.partial(os.system, "touch pwned")), "functools.partial, posix.system"),
    "run": (Call(runpy.run_path, "evil.py"), "runpy.run_path"),
    "method": (Call(pathlib.Path("pwned").touch), "builtins.getattr"),
    "namespace": (Call(argparse.Namespace), "it calls argparse.Namespace"),
    "hub": (Call(torch.hub.load, "evil/evil", "evil"), "it calls torch.hub.load"),
    "load": (Call(torch.load, "evil.pt"), "it calls torch.serialization.load"),
    "numpy": (Call(np.load, "evil.npy", None, True), "it calls numpy."),
}


@pytest.mark.parametrize("place", ["options", "tensor", "whole"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("attack", ATTACKS)
def test_code_is_refused(attack, zipped, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, why = ATTACKS[attack]
    content = {"options": {"g_ema": {}, "args": [call]}, "tensor": {"g_ema": {"a": call}}, "whole": call}[place]
    torch.save(content, "file.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="cannot be read as tensors and plain values") as caught:
        read_published(pathlib.Path("file.pt"))
    assert "If you trust the file, load it where its libraries are" in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert not zipped or why in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]


def test_calls_of_a_library_are_refused(library, reread):
    with pytest.raises(ValueError, match=r"it calls options_library\.run\. If you trust the file"):
        reread({"args": Call(library.run, "x")})


@pytest.mark.parametrize("make", ["State", "Slots"])
def test_states(make, library, reread):
    """An object's own way to take up its state is not followed; one that fits no dictionary is refused."""
    value = getattr(library, make)()
    value.a = 1
    if make == "State":
        assert reread({"args": value, "w": torch.arange(3)})["w"].tolist() == [0, 1, 2]
    else:
        with pytest.raises(ValueError, match=r"file\.pt' cannot be read"):
            reread({"args": value})


def test_nothing_is_left_allowed(library, reread):
    before = set(torch.serialization.get_safe_globals())
    reread({"args": library.Options(a=1)})
    assert set(torch.serialization.get_safe_globals()) == before


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"g_ema": {"a": torch.arange(1000.0)}, "args": argparse.Namespace(a=[1, "x"] * 100)}, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"file\.pt' (cannot be read|holds)"):
            read_published(path)
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_published(path)
        except ValueError as error:
            assert "file.pt' " in str(error)
