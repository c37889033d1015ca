"""Builds natten_ext_cuda: the CUDA library of natten_ext as a wheel of its own, which `make cuda-wheel` makes.

Environment variables as in the setup.py of natten_ext, the folder above, which does the work.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import Extension, setup


def natten_ext_setup():
    """The setup.py of natten_ext as a module."""
    path = Path(__file__).resolve().parents[1] / "setup.py"
    specification = importlib.util.spec_from_file_location("natten_ext_setup", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


main = natten_ext_setup()


class BuildCuda(main.NinjaBuild):
    """The CUDA library and what ptxas said of its kernels."""

    target = "natten_ext_cuda"

    def statements(self, file, build, package, torch):
        nvcc = main.installed_nvcc()
        if nvcc is None:
            raise SystemExit("natten_ext_cuda needs nvcc")
        main.add_cuda_library(file, nvcc, build, package, torch)


setup(
    version=main.version(),
    # The operators that the library implements are declared by the natten_ext of the same version.
    install_requires=[f"natten_ext=={main.version()}"],
    ext_modules=[Extension("natten_ext_cuda.library", [])],
    cmdclass={"build_ext": BuildCuda, "bdist_wheel": main.WheelForEveryPython},
)
