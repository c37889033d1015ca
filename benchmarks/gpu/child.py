"""Child processes that may die or hang: started with a time limit, watched, and started again for what is left.

A child reports one JSON object per line in ``STEM.jsonl`` and keeps what it is at in ``STEM.current``. Both outlive it:
a child that is started again reads what was done before (``EventLog.events``) and leaves out what was lost. This module
does not import torch, so that the process that watches can't be hurt by it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
POLL = 0.1  # seconds
START_LIMIT = 120.0  # seconds for imports, before the first item
MAX_STARTS = 12
# Exit status of a child that can't go on (a CUDA context that is broken for good) and has said what it lost.
LOST_STATUS = 75
OUT_OF_TIME = "out of time"

Event = dict[str, Any]

_live: set[subprocess.Popen[bytes]] = set()
_lock = threading.Lock()
_stopping = threading.Event()


class EventLog:
    """The child's side."""

    def __init__(self, stem: Path) -> None:
        self.path = stem.with_suffix(".jsonl")
        self._file = open(self.path, "a")  # noqa: SIM115 (open as long as the process lives)
        self._file.write("\n")  # an earlier process may have been killed within a line
        self._current = os.open(stem.with_suffix(".current"), os.O_WRONLY | os.O_CREAT)
        self._parent = os.getppid()

    def events(self) -> list[Event]:
        """What has been reported so far, by earlier processes too."""
        return EventReader(self.path).new()

    def write(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def at(self, *item: str) -> None:
        """Say what comes next: it is what is lost if this process dies or hangs. Ends if nobody watches any more."""
        if os.getppid() != self._parent:
            os._exit(1)
        os.pwrite(self._current, json.dumps(item).encode().ljust(4096), 0)

    def give_up(self, item: list[str], reason: str) -> None:
        """End the process, which can't go on, and lose ``item``."""
        self.write(lost=item, reason=reason)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(LOST_STATUS)


class EventReader:
    """The lines that have been completed since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def new(self) -> list[Event]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        events = []
        for line in data.splitlines():
            with contextlib.suppress(ValueError):  # a line that was never finished
                events.append(json.loads(line))
        return events


@dataclass(frozen=True)
class Ended:
    """How a child ended. ``status`` is None where it was killed for taking too long."""

    status: int | None
    seconds: float
    output: str

    @property
    def reason(self) -> str:
        """Empty if all is well."""
        if self.status == 0:
            return ""
        return OUT_OF_TIME if self.status is None else f"{describe_status(self.status)}: {last_line(self.output)}"


def run_limited(command: list[str], limit: float, log: Path, environment: dict[str, str] | None = None) -> Ended:
    """Run to the end, or kill the process and all that it started after ``limit`` seconds."""
    start = time.monotonic()
    size = log.stat().st_size if log.exists() else 0
    process = _start(command, log, environment)
    try:
        status = process.wait(timeout=max(0.0, limit))
    except subprocess.TimeoutExpired:
        status = None
    _kill(process)
    with open(log, errors="replace") as file:
        file.seek(size)
        output = file.read()
    return Ended(status, time.monotonic() - start, output)


@dataclass(frozen=True)
class Supervised:
    """``reason`` is empty where the child got to its end, at the first start or a later one."""

    reason: str
    starts: int


def supervise(
    command: list[str],
    stem: Path,
    deadline: float,
    item_limit: float,
    on_event: Callable[[Event], None],
    environment: dict[str, str] | None = None,
) -> Supervised:
    """Run a child that works through items, until it reports ``finished`` or the deadline (of ``time.monotonic``).

    When it dies, or stays at one item for more than ``item_limit`` seconds, that item is reported as
    ``{"lost": item, "reason": ...}`` and the same command is started again.
    """
    log, current = stem.with_suffix(".log"), stem.with_suffix(".current")
    reader = EventReader(stem.with_suffix(".jsonl"))
    finished = False

    def read() -> bool:
        nonlocal finished
        events = reader.new()
        for event in events:
            finished = finished or "finished" in event
            on_event(event)
        return bool(events)

    for start in range(1, MAX_STARTS + 1):
        current.unlink(missing_ok=True)
        process = _start(command, log, environment)
        changed, item, reason = time.monotonic(), None, ""
        while process.poll() is None and not reason:
            time.sleep(POLL)
            now = time.monotonic()
            news, at = read(), _read(current)
            if news or at != item:
                changed, item = now, at
            if now > deadline:
                reason = OUT_OF_TIME
            elif now - changed > (item_limit if item else START_LIMIT):
                reason = f"took longer than {item_limit:g} s" if item else "did not start in time"
        _kill(process)
        read()
        if _stopping.is_set():
            return Supervised("interrupted", start)
        if finished or reason == OUT_OF_TIME:
            return Supervised("" if finished else reason, start)
        item = _read(current)
        reason = reason or f"{describe_status(process.returncode)}: {last_line(_tail(log))}"
        if item is None:
            return Supervised(reason, start)
        if process.returncode != LOST_STATUS:
            with open(reader.path, "a") as file:
                file.write("\n" + json.dumps({"lost": item, "reason": reason}) + "\n")
        read()
    return Supervised(f"given up after {MAX_STARTS} starts; the last: {reason}", MAX_STARTS)


def stop() -> None:
    """End every child that is still running, and start no other."""
    _stopping.set()
    with _lock:
        processes = list(_live)
    for process in processes:
        _kill(process)


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


def last_line(text: str, limit: int = 300) -> str:
    """The last line that says something: not the list of modules behind a fatal error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = re.findall(r"Fatal Python error.*", text)
    return (fatal or lines)[-1][:limit] if lines else "(no output)"


def _start(command: list[str], log: Path, environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all that it starts can be ended with it
        )
    with _lock:
        _live.add(process)
    return process


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with _lock:
        _live.discard(process)


def _read(current: Path) -> list[str] | None:
    try:
        return json.loads(current.read_text())
    except (OSError, ValueError):  # not there yet
        return None


def _tail(log: Path, size: int = 64_000) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return file.read().decode(errors="replace")
