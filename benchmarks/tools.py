"""Command line tools of the machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def output_of(*command: str, folder: Path | None = None) -> str:
    """What a tool prints; empty if it is not there or takes longer than 20 seconds."""
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def nvidia_smi(*fields: str) -> list[str]:
    """What nvidia-smi says of the first GPU that this process may use; empty if there is no nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    which = [f"--id={visible}"] if visible else []
    answer = output_of("nvidia-smi", *which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return [value.strip() for value in answer.split("\n")[0].split(",")] if answer else []
