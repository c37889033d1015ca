"""Builds the CUDA kernels: with nvcc for GPUs (setup.py), and with the C++ compiler for the emulator (tests).

Environment variables: ``NATTEN_EXT_CUDA`` 0 leaves the kernels out and 1 makes a missing nvcc an error;
``TORCH_CUDA_ARCH_LIST`` lists compute capabilities as torch does ("8.0;9.0+PTX"); ``CUDA_HOME`` is where CUDA is.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.resolve()
SOURCE = ROOT / "csrc" / "cuda"
KERNELS = ("forward", "backward", "double_backward")
MODES = ("HalfMode", "BfloatMode", "Tf32Mode", "FloatMode", "DoubleMode")  # csrc/cuda/params.h
LIBRARY = "libnatten_ext_cuda.so"
RESOURCES = "cuda_resources.txt"  # what ptxas said of every kernel

CAPABILITIES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")
# Where no GPU is visible: runs on every GPU from 8.0 on; after 8.x the driver compiles it at first use.
DEFAULT_CAPABILITIES = "8.0+PTX"


def find_nvcc() -> str | None:
    """Path of nvcc, or None where the cuda backend is not to be built; says so in one line."""
    wanted = os.environ.get("NATTEN_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"NATTEN_EXT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        print("natten_ext: NATTEN_EXT_CUDA=0, so the cuda backend is not built")
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if nvcc is None and wanted == "1":
        raise SystemExit("natten_ext: NATTEN_EXT_CUDA=1, but there is no nvcc in CUDA_HOME, PATH or /usr/local/cuda")
    if nvcc is None:
        print("natten_ext: no nvcc in CUDA_HOME, PATH or /usr/local/cuda, so the cuda backend is not built")
    return nvcc


def capabilities(torch) -> str:
    """``TORCH_CUDA_ARCH_LIST``, else those of the GPUs of this machine, else ``DEFAULT_CAPABILITIES``."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    if torch.cuda.is_available():
        pairs = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
        found = [f"{major}.{minor}" for major, minor in sorted(pairs)]
        if set(found) <= set(CAPABILITIES):  # an older GPU can't run the kernels, a newer one can from PTX
            return ";".join(found)
    return DEFAULT_CAPABILITIES


def architecture_flags(capability_list: str) -> list[str]:
    """nvcc's flags for a list like "8.0;9.0+PTX"."""
    flags = []
    for entry in filter(None, re.split(r"[;,\s]+", capability_list)):
        number, ptx = entry.removesuffix("+PTX"), entry.endswith("+PTX")
        if number not in CAPABILITIES:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is not one of {', '.join(CAPABILITIES)}, with or without +PTX"
            )
        code = number.replace(".", "")
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    if not flags:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: no compute capability in {capability_list!r}")
    return flags


def kernel_flags(mode: str) -> list[str]:
    """nvcc's flags for one kernel file in one mode, without the architectures. ptxas reports resources."""
    options = ["-fPIC", "-fvisibility=hidden"]
    return ["-std=c++20", "-O3", *(f"-Xcompiler={o}" for o in options), "-Xptxas=-v", f"-DNATTEN_EXT_MODE={mode}"]


def add_library(file, nvcc: str, build: Path, package: Path, torch, target_version: str) -> None:
    """Adds the statements that build the cuda backend to setup.py's ninja file."""
    file.lines += [
        f"nvcc = {nvcc}",
        "rule compile_cuda",
        "  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link_cuda",
        "  command = $nvcc -shared $in $flags -o $out",
        "  description = link $out",
        "rule resources",
        "  command = cat $logs > $out",
    ]
    architectures = architecture_flags(capabilities(torch))
    folder = Path(torch.__file__).parent
    torch_flags = [f"-DTORCH_TARGET_VERSION={target_version}", f"-I{folder / 'include'}", "-x=cu", "-DUSE_CUDA"]
    flags = [flag for flag in kernel_flags("BfloatMode") if not flag.startswith("-DNATTEN_EXT_MODE")]
    library = file.statement("compile_cuda", build / "cuda_library.o", [SOURCE / "library.cpp"], flags + torch_flags)
    kernels = [
        file.statement(
            "compile_cuda",
            build / f"cuda_{kernel}_{mode}.o",
            [SOURCE / f"{kernel}.cu"],
            kernel_flags(mode) + architectures,
        )
        for kernel in KERNELS[::-1]  # the longest first
        for mode in MODES
    ]
    # libtorch.so is what brings libtorch_cuda.so at load time, also where the torch at hand has none to link to. With
    # --as-needed, the default of many compilers, a library is dropped in which the linker finds nothing.
    libraries = [f"-L{folder / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch_cpu", "-ltorch", "-lc10"]
    file.statement("link_cuda", package / LIBRARY, [library, *kernels], libraries)
    file.statement("resources", package / RESOURCES, kernels, [])
    file.lines.append(f"  logs = {' '.join(f'{kernel}.log' for kernel in kernels)}")


def build_emulator(folder: Path) -> Path:
    """Compiles the kernels for the host, under the emulator of csrc/emulator; returns the library's path.

    Raises RuntimeError with the compiler's messages if it fails.
    """
    import torch

    from setup import TORCH_TARGET_VERSION, NinjaFile, find_compiler, ninja_command

    folder.mkdir(parents=True, exist_ok=True)
    file = NinjaFile(find_compiler())
    includes = Path(torch.__file__).parent / "include"
    common = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DNATTEN_EXT_EMULATOR"]
    torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-isystem{includes}"]
    objects = [
        file.statement(
            "compile",
            folder / f"{kernel}_{mode}.o",
            [SOURCE / f"{kernel}.cu"],
            [*common, f"-DNATTEN_EXT_MODE={mode}", "-x", "c++"],
        )
        for kernel in KERNELS[::-1]
        for mode in MODES
    ]
    machine = ROOT / "csrc" / "emulator" / "machine.cpp"
    objects.append(file.statement("compile", folder / "machine.o", [machine], [*common, "-O2"]))
    objects.append(file.statement("compile", folder / "library.o", [SOURCE / "library.cpp"], common + torch_flags))
    libraries = [f"-L{includes.parent / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    library = file.statement("link", folder / "libnatten_ext_cuda_emulator.so", objects, libraries)
    with open(folder / "lock", "w") as lock:  # two runs of the tests may start together
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(file.lines) + "\n")
        done = subprocess.run(ninja_command(folder), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA emulator does not compile:\n{done.stdout}{done.stderr}")
    return library
