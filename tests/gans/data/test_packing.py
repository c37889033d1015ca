"""What conversions refuse, and that nothing is left of those that fail or are stopped."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from gans.commands.cli import main
from gans.common.files import new_file, new_folder
from gans.data import packing
from gans.data.sources import open_source
from tests.gans.data.test_shards import encoded, write_tar


def everything(root) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


@pytest.mark.parametrize("name", ["x.zip", "x-{0..1}.tar"])
def test_a_refused_conversion_leaves_no_folders(tmp_path, name):
    """Of those that it made; an older one stays."""
    data = write_tar(tmp_path / "x.tar", {"0.png": encoded(0), "1.png": b""})
    (tmp_path / "old").mkdir()
    assert main(["data", "--data", str(data), "--convert", f"{tmp_path}/old/new/{name}", "--size", "8"]) == 1
    assert everything(tmp_path) == ["old", "x.tar"]


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_sigterm_leaves_nothing(tmp_path, new):
    before = signal.getsignal(signal.SIGTERM)
    assert before == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt, match="terminated") as stopped, new(tmp_path / "a" / "b") as path:
        (path / "x" if path.is_dir() else path).write_text("x")
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.status == 143 and not everything(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
    thread = threading.Thread(target=lambda: new(tmp_path / "c").__enter__().touch())  # has no signals
    thread.start()
    thread.join()
    assert len(everything(tmp_path)) == 1


def test_handlers_of_others_stay(tmp_path):
    """As training has its own."""
    before = signal.signal(signal.SIGTERM, handler := lambda *_: None)
    try:
        with new_file(tmp_path / "x") as path:
            assert signal.getsignal(signal.SIGTERM) is handler
            path.touch()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_two_conversions_to_one_name(tmp_path, monkeypatch, capsys):
    """One writes while the other does; the one that ends later is told, and the first one's files are whole."""
    data = {value: str(write_tar(tmp_path / f"{value}.tar", {"0.png": encoded(value)})) for value in (1, 2)}
    command = ["--convert", str(tmp_path / "out.zip"), "--size", "8"]
    write, inner = packing._write_zip, []

    def meanwhile(*arguments):
        if not inner:
            inner.append(0)
            inner[0] = main(["data", "--data", data[2], *command])
        write(*arguments)

    monkeypatch.setattr(packing, "_write_zip", meanwhile)
    assert main(["data", "--data", data[1], *command]) == 1 and inner == [0]
    assert "out.zip' exists: it was written meanwhile; give another name" in capsys.readouterr().err
    assert open_source(tmp_path / "out.zip").open(0).getpixel((0, 0))[0] == 2
    assert everything(tmp_path) == ["1.tar", "2.tar", "out.zip"]


@pytest.mark.parametrize("name", ["x-*.tar", "x?.zip", "x-[1].tar"])
def test_names_that_could_not_be_read_again(tmp_path, name):
    with pytest.raises(ValueError, match=r"a name with \*, \? or \[, as .* could not be read again"):
        packing.check_destination(str(tmp_path / name))


def test_messages_name_the_data_that_were_given(tmp_path, capsys):
    for i in range(2):
        write_tar(tmp_path / f"x-{i}.tar", {"0.png": encoded(0)} | ({"0.cls": b"0"} if i else {}))
    data = str(tmp_path / "x-{0..1}.tar")
    with pytest.raises(ValueError, match=r"1 of 2 images of '.*x-\{0\.\.1\}\.tar' have no label"):
        _ = open_source(data).labels
    assert main(["data", "--data", str(tmp_path / "x-0.tar")]) == 0
    assert capsys.readouterr().out.startswith("1 image\n")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match=r"x\.txt' is none of what can be read: a folder, a ZIP file, shards"):
        open_source(tmp_path / "x.txt")
