"""Logs of a run: one JSON object a line, and the same numbers as TensorBoard scalars."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from gans.training.checkpoint import writing

NAME = "log.jsonl"


class RunLog:
    """Appends to `out/log.jsonl` and to TensorBoard's event files in `out`; what stands there is never rewritten.

    Opening it at `step` appends a line `{"event": "start", "step": ...}` with the time and what `start` has to say:
    lines before it of later steps are of a stretch that the run does again. OSError, with advice, where a
    file cannot be written.
    """

    def __init__(self, out: Path, step: int, start: Mapping[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / NAME
        self._checkpoints = out / "checkpoints"
        if self._is_cut_short():
            self._append("\n")
        self._append(_line({"event": "start", "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **start}))
        self._events = out / "events.out.tfevents.*"
        with writing(self._events, self._checkpoints):
            self._board = SummaryWriter(str(out), purge_step=step + 1 if step else 0)

    def _is_cut_short(self) -> bool:
        """Whether the last line there is has no end, which is what a crash or a full disk leaves."""
        with writing(self.path, self._checkpoints), self.path.open("a+b") as file:
            if not file.seek(0, os.SEEK_END):
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs named numbers for a step."""
        self._append(_line({"step": step, **values}))
        with writing(self._events, self._checkpoints):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _append(self, text: str) -> None:
        with writing(self.path, self._checkpoints), self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def close(self) -> None:
        """Flushes and closes TensorBoard's file."""
        with writing(self._events, self._checkpoints):
            self._board.close()


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def read(out: Path) -> list[dict[str, float]]:
    """The lines of numbers in a run's `log.jsonl`, in order, without those of stretches that the run did again.

    A line that is none of a log's is left out and named on stderr; a last one without its end is left out.
    """
    path = out / NAME
    lines: list[dict[str, float]] = []
    *complete, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(complete, 1):
        line = _parse(text)
        if line is None:
            print(f"skipped: {path}, line {number} is no line of a log: {text[:60]!r}", file=sys.stderr)
        elif "event" in line:
            lines = [other for other in lines if other["step"] <= line["step"]] if line["step"] else []
        else:
            lines.append(line)
    return lines


def _parse(text: str) -> dict[str, Any] | None:
    """A line's values: numbers, or an event with a step; None for anything else."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    numbers = all(isinstance(value, (int, float)) for value in line.values())
    return line if numbers or line.get("event") == "start" else None
