"""A CUDA driver that only pretends: Triton compiles and launches with its own launcher, and nothing runs.

Tensors are on the CPU. So everything from ``natten_ext`` to the call of ``cuLaunchKernelEx`` is real, which a test
checks (tests/operators/pretend_driver.py) and ``python -m benchmarks.host_time`` times.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from natten_ext.backends.triton import backend, configs
from natten_ext.backends.triton.launch import INTERPRETED

from .triton_usage import SHARED_LIMIT

SOURCE = Path(__file__).with_name("pretend_cuda.c")


class Driver:
    """Triton's driver of a GPU that is not there, to compile for it."""

    def __init__(self, arch: str) -> None:
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> Any:
        return self.target.arch

    def get_current_stream(self, device: Any = None) -> int:
        return 0


class _Launching(Driver):
    """Likewise, to launch on it as well."""

    launcher_cls = CudaLauncher

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        pretended = {
            "get_device_properties": lambda device: {"max_shared_mem": SHARED_LIMIT[arch]},
            "load_binary": lambda *binary: (1, 1, 0, 0, 1024),  # module, function, registers, spills, most threads
        }
        self.utils = SimpleNamespace(**vars(CudaUtils()) | pretended)

    def get_current_device(self) -> int:
        return 0


@contextmanager
def gpu(arch: str = "sm_90") -> Iterator[ctypes.CDLL]:
    """Inside, the backend ``triton`` takes CPU tensors and compiles for this architecture. Gives the pretended library.

    For the rest of the process, Triton has this driver.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: nothing can be compiled in this process")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        flags = "-O2", "-shared", "-fPIC", "-Wall", "-Werror", f"-Wl,-soname,{library.name}"
        subprocess.run(["gcc", *flags, "-o", library, SOURCE], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = folder  # where Triton links its launchers
        pretended = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        triton.runtime.driver.set_active(_Launching(arch))
        interpreted, backend._interpreted = backend._interpreted, lambda: True  # so says cannot_run of CPU tensors
        try:
            with configs.assumed_architecture(arch):
                yield pretended
        finally:
            backend._interpreted = interpreted
