"""Builds the compiled parts of natten_ext with ninja; metadata is in pyproject.toml.

Three shared objects: ``natten_ext/libnatten_ext_cpu.so``, the CPU kernels on LibTorch's stable ABI (any Python, torch
2.11 and later), compiled once per instruction set; ``natten_ext/libnatten_ext_cuda.so``, the same for GPUs, where torch
has CUDA and there is an nvcc; and, in a checkout, ``natten_ext/_C``, a small pybind11 module with which tests compare
the geometry. Wheels leave it out, so that one serves every Python. cuda_wheel/setup.py builds the second of the three
as a wheel of its own.

Environment variables: ``CXX`` and ``MAX_JOBS`` as usual; ``NATTEN_EXT_CUDA`` 0 leaves the CUDA kernels out and 1 builds
them with any torch and makes a missing nvcc an error; ``TORCH_CUDA_ARCH_LIST`` lists compute capabilities as torch does
("8.0;9.0+PTX"); ``CUDA_HOME`` is where CUDA is.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

KERNELS = ("forward", "backward", "double_backward")
CPU_KERNELS = (*KERNELS, "tangent")
# csrc/cuda/narrow_*.cu, grid_*.cu and short_*.cu, which are of half precision
NARROW_KERNELS = ("forward", "backward_key", "backward_query", "double_backward_key", "double_backward_query")
GRID_KERNELS = ("forward", "backward", "wide_backward", "double_backward_key", "double_backward_query")
SHORT_KERNELS = ("forward", "backward", "double_backward")
HALF_KERNELS = [
    f"{family}_{kernel}"
    for family, kernels in [("narrow", NARROW_KERNELS), ("grid", GRID_KERNELS), ("short", SHORT_KERNELS)]
    for kernel in kernels[::-1]
]
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11
MINIMUM_TORCH = (2, 11)

CUDA_SOURCE = ROOT / "csrc" / "cuda"
CUDA_MODES = ("HalfMode", "BfloatMode", "Tf32Mode", "FloatMode", "DoubleMode")  # csrc/cuda/params.h
# What is compiled of csrc/cuda, the longest first: name of the object, file, mode, whether for general neighborhoods.
CUDA_OBJECTS = [
    (f"{kernel}_{mode}{'_general' * general}", kernel, mode, general)
    for kernel in KERNELS[::-1]
    for general in (False, True)
    for mode in CUDA_MODES
]
CUDA_OBJECTS += [
    (f"{kernel}_{mode}", kernel, mode, False) for kernel in HALF_KERNELS for mode in ("HalfMode", "BfloatMode")
]
CUDA_LIBRARY = "libnatten_ext_cuda.so"
CUDA_RESOURCES = "cuda_resources.txt"  # what ptxas said of every kernel
# A program that launches all kernels, for compute-sanitizer; in checkouts only.
EVERY_KERNEL_SOURCE = ROOT / "benchmarks" / "gpu" / "every_kernel.cpp"
EVERY_KERNEL = ROOT / "build" / "every_kernel"
CAPABILITIES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")
# Where no GPU is visible: those of data centers, as far as nvcc knows them. 8.6 and 8.9 run the code of 8.0, later ones
# than the last its PTX.
DEFAULT_CAPABILITIES = ("8.0", "9.0", "10.0")


def instruction_sets() -> dict[str, tuple[int, list[str]]]:
    """Name -> (vector bytes, compiler flags), the first being what every machine of this kind has."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"baseline": (16, [])}
    return {
        "baseline": (16, []),
        "avx2": (32, ["-mavx2", "-mfma", "-mf16c"]),
        "avx512": (
            64,
            [
                "-mavx2",
                "-mfma",
                "-mf16c",
                "-mavx512f",
                "-mavx512dq",
                "-mavx512vl",
                "-mavx512bw",
                "-mprefer-vector-width=512",
            ],
        ),
    }


def find_compiler() -> str:
    """The C++ compiler: CXX, or c++/g++/clang++ from the path, tried on a small program."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        if shutil.which(shlex.split(candidate)[0]) is None:
            continue
        check = subprocess.run(
            [*shlex.split(candidate), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
            input="#include <vector>\nint main() { return [] { return 0; }(); }\n",
            text=True,
            capture_output=True,
            check=False,
        )
        if check.returncode == 0:
            return candidate
        raise SystemExit(f"natten_ext: the C++ compiler {candidate!r} does not compile C++20:\n{check.stderr}")
    raise SystemExit(
        "natten_ext needs a C++ compiler (GCC 11 or later, or Clang 14 or later), and found none of: "
        f"{', '.join(candidates)}. Install one (Debian, Ubuntu: apt install g++) or set CXX to its path."
    )


def import_build_requirements():
    """torch, or a message that says how to get it and what else is needed."""
    try:
        import ninja  # noqa: F401
        import pybind11  # noqa: F401
        import torch
    except ImportError as error:
        raise SystemExit(
            f"natten_ext builds with the torch that is installed, with ninja and pybind11; {error.name!r} is missing."
            " Install torch, ninja and pybind11 first, then: pip install --no-build-isolation ."
        ) from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        raise SystemExit(f"natten_ext needs torch >= {'.'.join(map(str, MINIMUM_TORCH))}, found {torch.__version__}")
    return torch


def ninja_command(folder: Path) -> list[str]:
    """What runs the build.ninja of a folder, with MAX_JOBS jobs if that is set."""
    import ninja

    # Where this Python borrows the packages of another, ninja.BIN_DIR is empty: the program may be on the path.
    path = os.pathsep.join(filter(None, (ninja.BIN_DIR, os.environ.get("PATH"))))
    program = shutil.which("ninja", path=path)
    if program is None:
        raise SystemExit(f"natten_ext: {ninja.__file__} knows no program ninja, and there is none on PATH")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    return [program, "-C", str(folder), *jobs]


def interface() -> int:
    """``natten_ext.orders.INTERFACE``; the package itself can't be imported before it is built."""
    specification = importlib.util.spec_from_file_location("natten_ext_orders", ROOT / "natten_ext" / "orders.py")
    orders = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(orders)
    return orders.INTERFACE


def torch_flags(torch) -> list[str]:
    """Of the files that include csrc/operators.h."""
    macros = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-DNATTEN_EXT_INTERFACE={interface()}"]
    return [*macros, "-isystem", str(Path(torch.__file__).parent / "include")]


class NinjaFile:
    """Compile and link statements of one build."""

    def __init__(self, compiler: str):
        self.lines = [
            f"cxx = {compiler}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            "  command = $cxx $in $flags -o $out",
            "  description = link $out",
        ]

    def statement(self, rule: str, output: Path, inputs: list[Path], flags: list[str]) -> Path:
        def escape(path: Path) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        self.lines.append(f"build {escape(output)}: {rule} {' '.join(map(escape, inputs))}")
        self.lines.append(f"  flags = {' '.join(shlex.quote(flag).replace('$', '$$') for flag in flags)}")
        return output


def installed_nvcc() -> str | None:
    """Path of nvcc, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


def find_nvcc(torch) -> str | None:
    """Path of nvcc, or None where the cuda backend is not to be built; says so in one line."""
    wanted = os.environ.get("NATTEN_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"NATTEN_EXT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        print("natten_ext: NATTEN_EXT_CUDA=0, so the cuda backend is not built")
        return None
    if wanted == "" and torch.version.cuda is None:
        print("natten_ext: this torch has no CUDA, so the cuda backend is not built (NATTEN_EXT_CUDA=1 builds it)")
        return None
    nvcc = installed_nvcc()
    if nvcc is None and wanted == "1":
        raise SystemExit("natten_ext: NATTEN_EXT_CUDA=1, but there is no nvcc in CUDA_HOME, PATH or /usr/local/cuda")
    if nvcc is None:
        print("natten_ext: no nvcc in CUDA_HOME, PATH or /usr/local/cuda, so the cuda backend is not built")
    return nvcc


def capabilities(torch, nvcc: str) -> str:
    """``TORCH_CUDA_ARCH_LIST``, else those of the GPUs of this machine, else ``DEFAULT_CAPABILITIES`` and PTX."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    if torch.cuda.is_available():
        pairs = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
        found = [f"{major}.{minor}" for major, minor in sorted(pairs)]
        if set(found) <= set(CAPABILITIES):  # an older GPU can't run the kernels, a newer one can from PTX
            return ";".join(found)
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return ";".join(c for c in DEFAULT_CAPABILITIES if f"sm_{c.replace('.', '')}" in known) + "+PTX"


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


def kernel_macros(mode: str, general: bool) -> list[str]:
    """Flags that say what a kernel file is compiled for."""
    return [f"-DNATTEN_EXT_MODE={mode}", f"-DNATTEN_EXT_GENERAL={str(general).lower()}"]


def capability_macro(capability_list: str) -> str:
    """Tells the library what its kernels are compiled for: 80:90 of "8.0;9.0+PTX"."""
    numbers = re.findall(r"\d+\.\d+", capability_list)
    return f"-DNATTEN_EXT_CAPABILITIES={':'.join(number.replace('.', '') for number in numbers)}"


def cuda_flags() -> list[str]:
    """nvcc's flags, without the architectures and ``kernel_macros``. ptxas reports resources."""
    return ["-std=c++20", "-O3", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", "-Xptxas=-v"]


def add_cuda_library(file: NinjaFile, nvcc: str, build: Path, package: Path, torch) -> list[Path]:
    """Adds the statements that build the cuda backend to a ninja file; returns the objects of its kernels."""
    file.lines += [
        f"nvcc = {nvcc}",
        "rule compile_cuda",
        "  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link_cuda",
        "  command = $nvcc $in $flags -o $out",
        "  description = link $out",
        "rule resources",
        "  command = cat $logs > $out",
    ]
    compiled_for = capabilities(torch, nvcc)
    architectures = architecture_flags(compiled_for)
    folder = Path(torch.__file__).parent
    flags = [*cuda_flags(), *torch_flags(torch), "-x=cu", "-DUSE_CUDA", capability_macro(compiled_for)]
    library = file.statement("compile_cuda", build / "cuda_library.o", [CUDA_SOURCE / "library.cpp"], flags)
    kernels = [
        file.statement(
            "compile_cuda",
            build / f"cuda_{name}.o",
            [CUDA_SOURCE / f"{kernel}.cu"],
            cuda_flags() + kernel_macros(mode, general) + architectures,
        )
        for name, kernel, mode, general in CUDA_OBJECTS
    ]
    # libtorch.so is what brings libtorch_cuda.so at load time, also where the torch at hand has none to link to. With
    # --as-needed, the default of many compilers, a library is dropped in which the linker finds nothing.
    libraries = ["-shared", f"-L{folder / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch_cpu", "-ltorch", "-lc10"]
    file.statement("link_cuda", package / CUDA_LIBRARY, [library, *kernels], libraries)
    file.statement("resources", package / CUDA_RESOURCES, kernels, [])
    file.lines.append(f"  logs = {' '.join(f'{kernel}.log' for kernel in kernels)}")
    return kernels


def add_every_kernel(file: NinjaFile, build: Path, kernels: list[Path]) -> None:
    """Adds the statements that link the kernels to EVERY_KERNEL, after those of ``add_cuda_library``."""
    program = file.statement("compile_cuda", build / "every_kernel.o", [EVERY_KERNEL_SOURCE], [*cuda_flags(), "-x=cu"])
    file.statement("link_cuda", EVERY_KERNEL, [program, *kernels], [])


class NinjaBuild(build_ext):
    """Builds shared objects in one ninja run and puts them into a package, which may be that of the checkout."""

    target: str
    """The package that they go into; its folder is beside the setup.py that is run."""

    def statements(self, file: NinjaFile, build: Path, package: Path, torch) -> None:
        """Adds what there is to build. ``build`` is for objects, ``package`` for what is to be installed."""
        raise NotImplementedError

    def run(self):
        compiler = find_compiler()
        torch = import_build_requirements()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        package = Path.cwd() if self._in_place() else Path(self.build_lib).resolve()
        package = package / self.target
        package.mkdir(parents=True, exist_ok=True)

        file = NinjaFile(compiler)
        self.statements(file, build, package, torch)
        (build / "build.ninja").write_text("\n".join(file.lines) + "\n")
        command = ninja_command(build)
        if self.verbose:
            command.append("-v")
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit("natten_ext: compilation failed; the compiler's messages are above")

    def get_outputs(self):
        package = Path(self.build_lib) / self.target
        return [str(path) for pattern in ("*.so", CUDA_RESOURCES) for path in package.glob(pattern)]

    def _in_place(self) -> bool:
        return bool(self.inplace or self.editable_mode)


class BuildWithNinja(NinjaBuild):
    """The shared objects of natten_ext."""

    target = "natten_ext"

    def statements(self, file: NinjaFile, build: Path, package: Path, torch) -> None:
        self._cpu_library(file, build, package / "libnatten_ext_cpu.so", torch)
        if self._in_place():
            suffix = sysconfig.get_config_var("EXT_SUFFIX")
            self._bindings(file, build, package / f"_C{suffix}")
        if nvcc := find_nvcc(torch):
            kernels = add_cuda_library(file, nvcc, build, package, torch)
            if self._in_place():
                add_every_kernel(file, build, kernels)
        else:  # what an earlier build left here, of other sources, would be loaded
            for left in (CUDA_LIBRARY, CUDA_RESOURCES):
                (package / left).unlink(missing_ok=True)

    @staticmethod
    def _cpu_library(file: NinjaFile, build: Path, output: Path, torch) -> None:
        common = [
            "-std=c++20",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",
            "-Wno-maybe-uninitialized",
        ]
        # Rows are short: a call of memcpy or memset costs more than the loop it replaces.
        common.append("-fno-tree-loop-distribute-patterns")
        sets = instruction_sets()
        source = ROOT / "csrc" / "cpu"
        library = build / "library.o"
        information = [
            *["-DNATTEN_EXT_X86"] * ("avx2" in sets),
            f'-DNATTEN_EXT_VERSION="{version()}"',
            f'-DNATTEN_EXT_BUILT_WITH_TORCH="{torch.__version__}"',
            f'-DNATTEN_EXT_INSTRUCTION_SETS="{" ".join(sets)}"',
        ]
        objects = [
            file.statement("compile", library, [source / "library.cpp"], common + torch_flags(torch) + information),
            file.statement("compile", build / "old_glibc.o", [source / "old_glibc.cpp"], common),
        ]
        for name, (vector_bytes, flags) in sets.items():
            macros = [f"-DNATTEN_EXT_ISA={name}", f"-DNATTEN_EXT_VECTOR_BYTES={vector_bytes}"]
            for kernel in CPU_KERNELS:
                target = build / f"{kernel}_{name}.o"
                objects.append(file.statement("compile", target, [source / f"{kernel}.cpp"], common + flags + macros))
        libraries = ["-shared", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
        file.statement("link", output, objects, libraries)

    @staticmethod
    def _bindings(file: NinjaFile, build: Path, output: Path) -> None:
        import pybind11

        flags = [
            "-std=c++20",
            "-O2",
            "-fPIC",
            "-fvisibility=hidden",
            f"-isystem{pybind11.get_include()}",
            f"-isystem{sysconfig.get_path('include')}",
        ]
        bindings = build / "bindings.o"
        objects = [file.statement("compile", bindings, [ROOT / "csrc" / "bindings.cpp"], flags)]
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        file.statement("link", output, objects, ["-shared", *undefined])


class WheelForEveryPython(bdist_wheel):
    """A wheel for one platform and every Python: nothing in it uses Python's ABI."""

    def get_tag(self):
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


def version() -> str:
    scope: dict[str, str] = {}
    exec((ROOT / "natten_ext" / "version.py").read_text(), scope)
    return scope["__version__"]


# The extension's name and sources are for setuptools; BuildWithNinja builds what there is to build.
if __name__ == "__main__":
    setup(
        ext_modules=[Extension("natten_ext._C", ["csrc/bindings.cpp"])],
        cmdclass={"build_ext": BuildWithNinja, "bdist_wheel": WheelForEveryPython},
    )
