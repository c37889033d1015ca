"""The source distribution: what it holds, and an installation from it where nothing of this checkout can be reached."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from setuptools import Distribution

import setup

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = ("natten_ext", "gans", "csrc", "benchmarks", "tests", "docs")
FILES = ("CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "setup.py")
BUILT = ("*.so", setup.CUDA_RESOURCES, "*.pyc", "__pycache__")
MADE_BY_SETUPTOOLS = ("PKG-INFO", "setup.cfg", "natten_ext.egg-info/")

SETUPTOOLS = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"

# The packages and programs that a build needs, and a call.
BORROWED = ("torch", "setuptools", "pybind11", "ninja")
ONE_CALL = """
import torch, natten_ext

q, k, v = (torch.randn(1, 6, 6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
table = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
results = []
for backend in ("cpu", "reference"):
    out = natten_ext.neighborhood_attention(q, k, v, 3, [1, 2], bias=table, backend=backend)
    first = torch.autograd.grad(out.sin().sum(), (q, k, v, table), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v, table))
    results.append((out, *first, *second))
torch.testing.assert_close(*results)
print(natten_ext.__file__)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of this checkout, without git, after a build for another Python with CUDA."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*BUILT))
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    for name in ("_C.cpython-37m-darwin.so", "libnatten_ext_cpu.so", setup.CUDA_LIBRARY, setup.CUDA_RESOURCES):
        (tree / "natten_ext" / name).write_text("left by another build")
    return tree


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    """The source distribution of that copy, packed."""
    run(sys.executable, "-c", SETUPTOOLS, tree.parent, cwd=tree)
    (packed,) = tree.parent.glob("*.tar.gz")
    return packed


def run(*command: object, **options) -> str:
    """What a program prints; fails with what it says if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NATTEN_EXT_", "PYTHON"))}
    environment |= {"NATTEN_EXT_CUDA": "0", **options.pop("env", {})}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(folder: Path, *parts: str) -> set[str]:
    """The files under some parts of a folder that no build made."""
    found = (path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    return {str(p.relative_to(folder)) for p in found if not any(p.match(pattern) for pattern in BUILT)}


def test_the_source_distribution_holds_the_checkout_but_its_pictures_and_what_was_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    expected = {*FILES, *files_of(ROOT, *FOLDERS)}
    pictures = {name for name in expected if name.startswith("docs/img/")}
    assert {name for name in names if not name.startswith(MADE_BY_SETUPTOOLS)} == expected - pictures


def test_an_earlier_build_is_not_taken_into_a_wheel(tree, tmp_path):
    run(sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path, cwd=tree)
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert built == files_of(ROOT, "natten_ext", "gans")


def test_a_build_without_cuda_removes_the_library_of_one_with_it(monkeypatch, tmp_path):
    monkeypatch.setenv("NATTEN_EXT_CUDA", "0")
    monkeypatch.setattr(setup, "ninja_command", lambda folder: ["true"])
    package = tmp_path / "lib" / "natten_ext"
    package.mkdir(parents=True)
    for name in (setup.CUDA_LIBRARY, setup.CUDA_RESOURCES, "libnatten_ext_cpu.so"):
        (package / name).touch()
    command = setup.BuildWithNinja(Distribution())
    command.build_temp, command.build_lib = str(tmp_path / "temp"), str(tmp_path / "lib")
    command.run()
    assert [path.name for path in package.iterdir()] == ["libnatten_ext_cpu.so"]


def test_a_ninja_that_is_nowhere_is_named(monkeypatch, tmp_path):
    import ninja

    monkeypatch.setattr(ninja, "BIN_DIR", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="none on PATH"):
        setup.ninja_command(tmp_path)


@pytest.mark.slow
def test_an_installation_from_the_source_distribution(sdist, tmp_path):
    """All kernels compile and link, without optimisation, which takes a third of the time; one call in every order."""
    environment, compiler = tmp_path / "environment", tmp_path / "compiler"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    borrowed = {str(Path(importlib.import_module(name).__file__).parents[1]) for name in BORROWED}
    (site / "borrowed.pth").write_text("\n".join(borrowed))  # an editable installation there stays unseen
    compiler.write_text(f'#!/bin/sh\nexec {setup.find_compiler()} "$@" -O0\n')
    compiler.chmod(0o755)
    path = os.pathsep.join((str(Path(setup.ninja_command(tmp_path)[0]).parent), os.environ["PATH"]))
    options = ("--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir")
    pip = ("-m", "pip", "--disable-pip-version-check", "--python", python)
    run(sys.executable, *pip, "install", *options, sdist, cwd=tmp_path, env={"CXX": str(compiler), "PATH": path})

    assert Path(run(python, "-I", "-c", ONE_CALL, cwd=tmp_path).strip()).parent == site / "natten_ext"
    assert files_of(site, "natten_ext", "gans") == files_of(ROOT, "natten_ext", "gans")
    run(python.with_name("gans"), "--version", cwd=tmp_path)
