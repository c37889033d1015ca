"""The CUDA emulator for the tests of the ``cuda`` backend on a machine without a GPU: built once, then loaded.

``use`` must run before anything asks which backends there are.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulator"
EVERY_KERNEL = FOLDER / "every_kernel"
"""benchmarks/gpu/every_kernel.cpp, linked with the emulated kernels."""


def use() -> None:
    """Run the ``cuda`` backend under the emulator here, unless only other backends are tested."""
    wanted = os.environ.get("NATTEN_EXT_TEST_BACKENDS", "")
    if wanted and "cuda" not in wanted.split(","):
        return
    if not os.environ.get("NATTEN_EXT_CUDA_EMULATOR"):
        os.environ["NATTEN_EXT_CUDA_EMULATOR"] = str(build(FOLDER))


def build(folder: Path) -> Path:
    """Compile the kernels for the host, under the emulator of csrc/emulator; returns the library's path.

    Links EVERY_KERNEL too. Raises RuntimeError with the compiler's messages if it fails.
    """
    import setup

    folder.mkdir(parents=True, exist_ok=True)
    file = setup.NinjaFile(setup.find_compiler())
    common = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DNATTEN_EXT_EMULATOR"]
    objects = [
        file.statement(
            "compile",
            folder / f"{name}.o",
            [setup.CUDA_SOURCE / f"{kernel}.cu"],
            [*common, *setup.kernel_macros(mode, general), "-x", "c++"],
        )
        for name, kernel, mode, general in setup.CUDA_OBJECTS
    ]
    machine = ROOT / "csrc" / "emulator" / "machine.cpp"
    objects.append(file.statement("compile", folder / "machine.o", [machine], [*common, "-O2"]))
    program = file.statement("compile", folder / "every_kernel.o", [setup.EVERY_KERNEL_SOURCE], common)
    file.statement("link", folder / EVERY_KERNEL.name, [program, *objects], [])
    flags = common + setup.torch_flags(torch)
    objects.append(file.statement("compile", folder / "library.o", [setup.CUDA_SOURCE / "library.cpp"], flags))
    libraries = ["-shared", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    library = file.statement("link", folder / "libnatten_ext_cuda_emulator.so", objects, libraries)
    with open(folder / "lock", "w") as lock:  # two runs of the tests may start together
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(file.lines) + "\n")
        done = subprocess.run(setup.ninja_command(folder), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA emulator does not compile:\n{done.stdout}{done.stderr}")
    return library
