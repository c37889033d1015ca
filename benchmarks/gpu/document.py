"""The result of a gpu_check: one JSON and one readable page, rewritten whole whenever there is news."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .figures import figures_to_reach
from .markdown import page

INTERVAL = 3.0  # seconds between two writings, at least
JSON_NAME, PAGE_NAME, LOG_NAME = "gpu_check.json", "gpu_check.md", "gpu_check.log"


class Document:
    """``data`` may be changed by any thread that holds ``lock``; ``save`` writes both files, each whole or not at all.

    ``data``: ``arguments``, ``commit``, ``machine`` (driver and tools), ``environment`` and ``backends`` (of the
    child that could import torch), ``parts`` (by name: status, reason, seconds, limit, and what the part found),
    ``rates`` (by precision), ``rows`` and ``cells_not_run`` (benchmark), ``figures``, ``finished``.
    """

    def __init__(self, folder: Path, **data: Any) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.data: dict[str, Any] = {
            **data, "machine": {}, "environment": {}, "backends": {}, "parts": {}, "rates": {}, "rows": [],
            "cells_not_run": [], "figures": [], "finished": False,
        }  # fmt: skip
        self._saved = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, now: bool = True) -> None:
        """Write the files; without ``now`` only if the last time is a while ago."""
        with self.lock:
            if not now and time.monotonic() - self._saved < INTERVAL:
                return
            self.data["figures"] = [asdict(figure) for figure in figures_to_reach(self.data["rows"])]
            self._replace(JSON_NAME, _dump(self.data))
            self._replace(PAGE_NAME, page(self.data))
            self._saved = time.monotonic()

    def _replace(self, name: str, text: str) -> None:
        partial = self.folder / (name + ".partial")
        partial.write_text(text)
        partial.replace(self.folder / name)


def _dump(data: dict[str, Any]) -> str:
    """JSON with one line per benchmark row, so that results can be compared line by line."""
    rows = ",\n".join(json.dumps(row) for row in data["rows"])
    text = json.dumps({**data, "rows": []}, indent=1)
    return text.replace('\n "rows": []', f'\n "rows": [\n{rows}\n ]' if rows else '\n "rows": []') + "\n"
