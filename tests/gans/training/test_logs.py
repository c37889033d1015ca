"""The log is appended to and never rewritten; what is broken in it is named and stands in nobody's way."""

from __future__ import annotations

import json
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gans.training import logs, monitor
from gans.training.logs import RunLog
from gans.training.loop import train

AFRESH = {"checkpoint": None, "changed": {}}


def write(out: Path, first: int, last: int, value: float, start: dict = AFRESH) -> None:
    log = RunLog(out, first - 1, start)
    for step in range(first, last + 1):
        log.write(step, {"loss": value})
    log.close()


def test_steps_that_are_done_again_count_once(tmp_path):
    write(tmp_path, 1, 5, 1.0)
    write(tmp_path, 3, 4, 2.0)
    write(tmp_path, 5, 6, 3.0, {"checkpoint": "step-4", "changed": {"lr_d": "1 -> 2"}})
    expected = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 3.0), (6, 3.0)]
    assert [(line["step"], line["loss"]) for line in logs.read(tmp_path)] == expected
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 2, 3, 4, 4, 5, 6]
    starts = [line for line in lines if "event" in line]
    assert (
        starts[2].items()
        >= {"event": "start", "step": 4, "checkpoint": "step-4", "changed": {"lr_d": "1 -> 2"}}.items()
    )
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == expected


def test_a_fresh_start_makes_all_lines_before_it_void(tmp_path):
    write(tmp_path, 1, 3, 1.0)
    write(tmp_path, 1, 2, 2.0)
    assert [(line["step"], line["loss"]) for line in logs.read(tmp_path)] == [(1, 2.0), (2, 2.0)]


BROKEN = [
    b"not JSON",
    b'{"step": 2, "loss"',
    b"\0" * 100,
    b"\xff\xfe",
    b"[1, 2]",
    b'{"loss": 1}',
    b'{"step": 2, "loss": "x"}',
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_line_is_named_and_left_out(tmp_path, capsys, broken):
    write(tmp_path, 1, 3, 1.0)
    path = tmp_path / "log.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], broken, *lines[2:]]))
    assert [line["step"] for line in logs.read(tmp_path)] == [1, 2, 3]
    assert re.fullmatch(rf"skipped: {path}, line 3 is no line of a log: .*\n", capsys.readouterr().err)


def test_resuming_a_run_with_broken_lines(tiny, tiny_run, capsys):
    train(replace(tiny, steps=4), tiny_run, progress=False)
    path = Path(tiny_run.out) / "log.jsonl"
    text = path.read_bytes().replace(b'{"step": 2', b'{"st\0p": 2', 1) + b'{"step": 5, "cut'
    path.write_bytes(text)
    train(tiny, replace(tiny_run, resume="latest"), progress=False)
    assert path.read_bytes().startswith(text + b"\n")
    errors = capsys.readouterr().err
    assert f"{path}, line 2 " in errors and f"{path}, line 4 " in errors
    assert [line["step"] for line in logs.read(Path(tiny_run.out))] == [4, 6]


def full(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")  # a device that takes nothing


WAY_ON = r"\(\d+ MiB free\)\. If the disk is full, make room\. Last good checkpoint: "


def test_full_disk_while_logging(tiny, tiny_run):
    """One message with the file, the room left, the last good checkpoint and what to do; then it can be done."""
    train(replace(tiny, steps=2), tiny_run, progress=False)
    path = Path(tiny_run.out) / "log.jsonl"
    path.rename(kept := path.with_name("kept"))
    full(path)
    resume = replace(tiny_run, resume="latest")
    message = (
        rf"cannot write {path}: .*No space left on device {WAY_ON}.*step-00000002; --resume latest goes on from it"
    )
    with pytest.raises(OSError, match=message):
        train(tiny, resume, progress=False)
    path.unlink()
    kept.rename(path)
    train(tiny, resume, progress=False)
    assert [line["step"] for line in logs.read(Path(tiny_run.out))] == [2, 4, 6]


@pytest.mark.parametrize("name", ["samples/.partial-step-00000003.png", ".partial-config.json", ".partial-curves.png"])
def test_full_disk_while_writing_other_files(tiny, tiny_run, name, monkeypatch):
    """An older file of that name stays whole."""
    monkeypatch.setattr(monitor, "remove_leftovers", lambda out: None)
    train(replace(tiny, steps=2), tiny_run, progress=False)
    before = (Path(tiny_run.out) / "config.json").read_text()
    full(Path(tiny_run.out) / name)
    with pytest.raises(OSError, match=rf"cannot write .*{name.replace('.partial-', '')}: .*{WAY_ON}.*step-0000000"):
        train(tiny, replace(tiny_run, resume="latest"), progress=False)
    assert json.loads((Path(tiny_run.out) / "config.json").read_text()).keys() == json.loads(before).keys()


def test_a_log_that_cannot_grow_keeps_its_lines(tmp_path):
    write(tmp_path, 1, 20, 1.0)
    path = tmp_path / "log.jsonl"
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"cannot write {path}: .*starts afresh"):
            RunLog(tmp_path, 20, AFRESH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes().startswith(before)
    write(tmp_path, 21, 22, 1.0)
    assert [line["step"] for line in logs.read(tmp_path)] == list(range(1, 23))
