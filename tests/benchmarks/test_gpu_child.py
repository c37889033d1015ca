"""Children that die, hang, or are cut off: what they lose is reported, and the rest is done."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import child
from benchmarks.gpu.child import ROOT, EventLog, EventReader, run_limited, supervise

PROGRAM = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.child import EventLog

log = EventLog(Path(sys.argv[1]))
seen = [event.get("done") or event["lost"][0] for event in log.events()]
for item in sys.argv[2:]:
    if item in seen:
        continue
    log.at(item)
    if item == "dies":
        os.kill(os.getpid(), 11)
    if item == "hangs":
        time.sleep(600)
    if item == "raises":
        raise RuntimeError("no such thing")
    if item == "poisons":
        log.give_up([item], "the context is broken")
    if item == "half a line":
        log._file.write('{"done": "ha')
        log._file.flush()
        os._exit(3)
    log.write(done=item)
log.write(finished=True)
"""


@pytest.fixture
def watch(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "POLL", 0.02)

    def run(*items, seconds=60.0, item_limit=30.0):
        events = []
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "child"), *items]
        ended = supervise(command, tmp_path / "child", time.monotonic() + seconds, item_limit, events.append)
        done = [event["done"] for event in events if "done" in event]
        lost = {event["lost"][0]: event["reason"] for event in events if "lost" in event}
        return ended, done, lost

    return run


def test_all_is_well(watch):
    ended, done, lost = watch("a", "b")
    assert (ended.reason, ended.starts, done, lost) == ("", 1, ["a", "b"], {})


def test_what_dies_costs_its_item_alone(watch):
    ended, done, lost = watch("a", "dies", "b", "raises", "c", "poisons", "d", "half a line", "e")
    assert (ended.reason, ended.starts, done) == ("", 5, ["a", "b", "c", "d", "e"])
    assert lost == {
        "dies": "killed by SIGSEGV: (no output)",
        "raises": "exit status 1: RuntimeError: no such thing",
        "poisons": "the context is broken",
        "half a line": lost["half a line"],
    }
    assert lost["half a line"].startswith("exit status 3")


def test_what_hangs_is_killed(watch):
    ended, done, lost = watch("a", "hangs", "b", item_limit=1.0)
    assert (ended.reason, done, lost) == ("", ["a", "b"], {"hangs": "took longer than 1 s"})


def test_the_deadline_ends_it(watch):
    begin = time.monotonic()
    ended, done, lost = watch("a", "hangs", seconds=3.0)
    assert time.monotonic() - begin < 60  # not the 600 s of what hangs
    assert (ended.reason, lost) == ("out of time", {})
    assert done in (["a"], [])  # none where this machine is too busy to start Python in time


def test_a_child_that_does_not_start(tmp_path):
    ended = supervise(
        [sys.executable, "-c", "raise SystemExit('nothing here')"], tmp_path / "x", time.monotonic() + 60, 30, print
    )
    assert (ended.reason, ended.starts) == ("exit status 1: nothing here", 1)


def test_a_limited_run_ends_with_all_it_started(tmp_path):
    program = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    ended = run_limited([sys.executable, "-c", program], 2.0, tmp_path / "log")
    assert (ended.status, ended.reason) == (None, "out of time")
    if ended.output.strip():  # the grandchild was started
        deadline = time.monotonic() + 5
        while Path(f"/proc/{int(ended.output)}/cmdline").exists() and time.monotonic() < deadline:
            if Path(f"/proc/{int(ended.output)}/cmdline").read_text() == "":  # a zombie
                break
            time.sleep(0.05)
        else:
            assert not Path(f"/proc/{int(ended.output)}").exists()


def test_output_and_status_of_a_limited_run(tmp_path):
    ended = run_limited([sys.executable, "-c", "print('last words'); raise SystemExit(7)"], 60, tmp_path / "log")
    assert ended.reason == "exit status 7: last words"


def test_events_are_read_once_and_whole(tmp_path):
    log, reader = EventLog(tmp_path / "x"), EventReader(tmp_path / "x.jsonl")
    log.write(a=1)
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write('{"b": 2')
    assert reader.new() == [{"a": 1}]
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write("}\n")
    assert (reader.new(), reader.new()) == ([{"b": 2}], [])


def test_a_child_whose_parent_is_gone_ends(tmp_path):
    program = f"""
import os, time
from pathlib import Path
from benchmarks.gpu.child import EventLog
stem = Path({str(tmp_path / "x")!r})
if os.fork() == 0:
    log, parent = EventLog(stem), os.getppid()
    log.write(ready=True)
    while os.getppid() == parent:
        time.sleep(0.02)
    log.at("an item")
    log.write(alive=True)
    os._exit(0)
while not stem.with_suffix(".jsonl").exists() or not stem.with_suffix(".jsonl").read_text().strip():
    time.sleep(0.02)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=True)
    time.sleep(1)
    assert EventReader(tmp_path / "x.jsonl").new() == [{"ready": True}]
