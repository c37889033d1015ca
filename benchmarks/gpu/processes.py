"""Commands with a time limit, which end with all that they started; imports no torch, so that nothing can hurt it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OUT_OF_TIME = "out of time"
GRACE = 15.0  # seconds to write down what there is after an interrupt; pytest's workers take up to ten

_running: set[Process] = set()


@dataclass(frozen=True)
class Ended:
    """How a command ended. ``status`` is None where it was ended for taking too long."""

    status: int | None
    output: str

    @property
    def reason(self) -> str:
        """Empty if all is well; else the status, and the last line that says something."""
        if self.status == 0:
            return ""
        if self.status is None:
            return OUT_OF_TIME
        how = f"exit status {self.status}"
        with contextlib.suppress(ValueError):
            how = f"killed by {signal.Signals(-self.status).name}"
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return f"{how}: {lines[-1][:300] if lines else '(no output)'}"


class Process:
    """A command, started in the repository's root in a session of its own; its output goes to the file ``log``."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}, start_new_session=True,
            )  # fmt: skip
        _running.add(self)

    def release(self) -> None:
        """Send the line that the process waits for."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def wait_for(self, line: str, seconds: float) -> bool:
        """Wait until it has printed a line; False if it ended without, or ``seconds`` are over."""
        end = time.monotonic() + seconds
        while True:
            running = self._process.poll() is None
            if line in self.log.read_text(errors="replace").splitlines():
                return running
            if not running or time.monotonic() > end:
                return False
            time.sleep(0.05)

    def wait(self, seconds: float) -> Ended:
        """Wait for its end; after ``seconds`` it is interrupted, and killed if that does not end it soon."""
        status = None
        try:
            status = self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        self.kill()
        return Ended(status, self.log.read_text(errors="replace"))

    def kill(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        _running.discard(self)


def kill_all() -> None:
    """End every process that is still running."""
    for process in list(_running):
        process.kill()


def left(deadline: float) -> float:
    """Seconds until a time of ``time.monotonic``."""
    return deadline - time.monotonic()
