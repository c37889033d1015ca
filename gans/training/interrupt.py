"""Ctrl-C and SIGTERM: a run that is asked to stop finishes its step and writes a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

REPEATED = 1.0
"""Seconds in which a signal that comes again is the same one: a terminal, `timeout` and `torchrun` may each send it, to
the process and to its group."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has stopped. The message says at which step, and how to go on."""

    def __init__(self, number: int, message: str, *, together: bool = False) -> None:
        super().__init__(message)
        self.status = 128 + number
        """The exit status that shells expect."""
        self.together = together
        """Whether every process of the world has stopped after the same step, and raises this too."""


class StopSignals:
    """A context in which a first SIGINT or SIGTERM is only noted, in `received`; a second one acts as it did outside.

    Signals that were ignored outside stay so. Has no effect outside Python's main thread, which alone has signals.
    """

    def __init__(self, *, announce: bool) -> None:
        self.received: int | None = None
        self._announce = announce
        self._when = 0.0
        self._outside: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._outside[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._outside.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._when = number, time.monotonic()
            if self._announce:
                name = signal.Signals(number).name
                text = f"\n{name}: stopping after this step, with a checkpoint. Once more stops at once.\n"
                with suppress(OSError):  # a file object could be in the middle of a write; the terminal may be gone
                    os.write(2, text.encode())
        elif time.monotonic() - self._when > REPEATED:
            signal.signal(number, self._outside[number])
            signal.raise_signal(number)
