"""What a result was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import natten_ext

from .tools import output_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("natten", "triton", "flash-attn", "numpy")


def describe_environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Machine, software, commit and the state of the backends, as plain data."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "backends": {s.name: s.reason or "available" for s in natten_ext.list_backends(device=device, dtype=dtype)},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return facts


def load_average() -> float:
    """Processes that ran or waited to run during the last minute."""
    return os.getloadavg()[0]


def limit_memory(share: float = 0.8) -> None:
    """Make allocations beyond a share of the free memory fail, instead of having the machine kill the process."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as meminfo:
            free = 1024 * next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable"))
    except OSError:
        pass
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(share * free)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _git(*arguments: str) -> str:
    return output_of("git", *arguments, folder=ROOT).strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return next(line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
