"""Logs of a run: one JSON object a line, and the same numbers as TensorBoard scalars."""

from __future__ import annotations

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Appends to `out/log.jsonl` and to TensorBoard's event files in `out`.

    Opening it at `step` drops the lines of later steps, which a resumed run writes again.
    """

    def __init__(self, out: Path, step: int = 0) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "log.jsonl"
        kept = [line for line in read(out) if line["step"] <= step] if step and self.path.exists() else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(out), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs named numbers for a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._board.close()


def read(out: Path) -> list[dict[str, float]]:
    """The lines of a run's `log.jsonl`; a last line cut short by a crash is left out."""
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
