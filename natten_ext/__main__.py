"""``python -m natten_ext``: what runs here and why, to read and to put into a report of a bug."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__, list_backends
from .backends import cpu, cuda
from .backends.choice import check_environment

_VARIABLES = ("NATTEN_EXT_", "TRITON_", "PYTORCH_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""Environment variables, by their beginnings, that change what runs."""


def report() -> Iterator[tuple[str, str]]:
    """Pairs of a name and what there is to say of it."""
    yield "natten_ext", f"{__version__} in {Path(__file__).parent}"
    yield "python", f"{platform.python_version()} in {sys.prefix}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    for package in ("triton", cuda.ADD_ON, "natten"):
        yield package, _version_of(package)
    yield "system", platform.platform()
    built = cpu.build_information()
    yield "cpu", f"{_processor()}, {torch.get_num_threads()} threads"
    yield "instructions", f"{cpu.instruction_set()} (compiled: {built['instruction_sets']})"
    yield (
        "cpu library",
        f"{built['version']}, compiler {built['compiler']}, torch {built['torch']}",
    )
    yield "cuda library", str(cuda.library_folder() or "none")
    yield from _gpus()
    for name, value in sorted(os.environ.items()):
        if name.startswith(_VARIABLES):
            yield "environment", f"{name}={value}"


def backends() -> Iterator[tuple[str, str, str]]:
    """(device, backend, "yes" or why not) for full attention in float32, in the order in which ``auto`` tries them."""
    for device in ("cpu", "cuda"):
        for status in list_backends(device, neighborhood="full"):
            yield device, status.name, status.reason or "yes"


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        yield "gpu", "torch finds none"
        return
    for device in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        size = properties.total_memory / 2**30
        yield "gpu", f"{properties.name}, compute capability {properties.major}.{properties.minor}, {size:.0f} GiB"


def main(arguments: list[str] | None = None) -> None:
    about = (
        "Prints versions, the machine and the environment variables that matter, then for CPUs and GPUs which backend "
        "runs and why the others do not."
    )
    parser = argparse.ArgumentParser(prog="python -m natten_ext", description=about)
    parser.parse_args(arguments)
    try:
        check_environment()
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    for name, value in report():
        print(f"{name:15} {value}")
    print("\nWhat runs full attention in float32, in the order in which backend='auto' tries them:\n")
    for device, name, answer in backends():
        print(f"{device:5} {name:10} {answer}")


if __name__ == "__main__":
    main()
