"""The source distribution and the wheel: what they hold, and that they work where nothing of this checkout is."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

import hub_kernel
import natten_ext
import setup
from natten_ext import __main__, orders
from natten_ext.backends import cpu, cuda, support

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = ("natten_ext", "gans", "csrc", "cuda_wheel", "benchmarks", "tests", "docs")
FILES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "hub_kernel.py",
    "mkdocs.yml",
    "pyproject.toml",
    "setup.py",
)
BUILT = ("*.so", setup.CUDA_RESOURCES, "*.pyc", "__pycache__", "*.egg-info", "build")
MADE_BY_SETUPTOOLS = ("PKG-INFO", "setup.cfg", "natten_ext.egg-info/")

SETUPTOOLS = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"

# The packages and programs that a build needs.
BORROWED = ("torch", "setuptools", "pybind11", "ninja")
SMOKE = Path(__file__).with_name("wheel_smoke.py")

LIBRARY = "libnatten_ext_cpu.so"

# A compiler that only preprocesses, and a linker that copies a library; the output is the argument after -o.
STAND_IN = """#!/bin/sh
for argument; do
  [ "$before" = -o ] && output=$argument
  before=$argument
done
case " $* " in
  *" -c "*) exec {compiler} "$@" -E ;;
  *" -shared "*) cp {library} "$output" ;;
  *) exec {compiler} "$@" ;;
esac
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
    found = (path.relative_to(folder) for part in parts for path in (folder / part).rglob("*") if path.is_file())
    return {str(p) for p in found if not any(q.match(pattern) for q in (p, *p.parents) for pattern in BUILT)}


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
def test_a_wheel_from_the_source_distribution(sdist, tmp_path):
    """It has every file that the kernels include. The wheel is for any Python and installs and computes without a
    compiler. The library in it is this checkout's, which compiled the same sources."""
    environment, compiler, nothing = tmp_path / "environment", tmp_path / "compiler", tmp_path / "nothing"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    borrowed = {str(Path(importlib.import_module(name).__file__).parents[1]) for name in BORROWED}
    (site / "borrowed.pth").write_text("\n".join(borrowed))  # an editable installation there stays unseen
    compiler.write_text(STAND_IN.format(compiler=setup.find_compiler(), library=ROOT / "natten_ext" / LIBRARY))
    compiler.chmod(0o755)
    nothing.mkdir()
    path = os.pathsep.join((str(Path(setup.ninja_command(tmp_path)[0]).parent), os.environ["PATH"]))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    options = ("--no-deps", "--no-index", "--no-cache-dir")
    build = (*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", tmp_path, sdist)
    run(*build, cwd=tmp_path, env={"CXX": str(compiler), "PATH": path})

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"natten_ext-{setup.version()}-py3-none-linux_")
    run(*pip, "install", *options, "--ignore-installed", wheel, cwd=tmp_path, env={"PATH": str(nothing)})
    assert Path(run(python, "-I", SMOKE, cwd=tmp_path).splitlines()[-1]).parent == site / "natten_ext"
    assert files_of(site, "natten_ext", "gans") == files_of(ROOT, "natten_ext", "gans")
    assert [path.name for path in (site / "natten_ext").rglob("*.so")] == [LIBRARY]
    assert_loads_with_old_glibc(site / "natten_ext" / LIBRARY)
    run(python.with_name("gans"), "--version", cwd=tmp_path)


def assert_loads_with_old_glibc(library: Path) -> None:
    """No symbol is newer than glibc 2.28, which torch's own wheels need."""
    symbols = run("objdump", "-T", library)
    versions = {tuple(map(int, number.split("."))) for number in re.findall(r"\(GLIBC_([0-9.]+)\)", symbols)}
    assert max(versions) <= (2, 28), symbols


def test_the_cuda_add_on_is_found_and_must_have_this_version(monkeypatch, tmp_path):
    package = tmp_path / cuda.ADD_ON
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cuda, "__file__", str(tmp_path / "natten_ext" / "backends" / "cuda.py"))
    monkeypatch.delenv(cuda.EMULATOR_VARIABLE, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    load = cuda._not_loaded.__wrapped__
    assert "natten_ext_cuda is not installed" in load()
    (package / setup.CUDA_LIBRARY).write_text("no library")
    monkeypatch.setattr(cuda, "version", lambda name: "0.1.0")
    assert load() == f"natten_ext_cuda must have the version of natten_ext, {setup.version()}, got 0.1.0"
    monkeypatch.setattr(cuda, "version", lambda name: setup.version())
    assert "libnatten_ext_cuda.so does not load" in load()


def test_a_library_of_other_sources_is_refused_when_it_is_loaded(monkeypatch):
    """Not at the first call, with a message about operands."""
    changed = "import torch, zlib; zlib.crc32 = lambda data: 1; import natten_ext"
    done = subprocess.run([sys.executable, "-c", changed], cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "libnatten_ext_cpu.so was built from other sources" in last
    assert support.REBUILD in last

    library = ROOT / "natten_ext" / "libnatten_ext_cpu.so"
    assert support.load(library, torch.ops.natten_ext_cpu) == ""
    assert "must be built again" in support.load(library, torch.ops.natten_ext_before_it_had_a_number)
    assert setup.interface() == orders.INTERFACE


def test_a_report_for_bugs(capsys):
    """``python -m natten_ext``: the versions, and every backend with its answer."""
    __main__.main([])
    printed = capsys.readouterr().out
    for part in (setup.version(), torch.__version__, cpu.instruction_set(), cpu.build_information()["compiler"]):
        assert part in printed
    for status in natten_ext.list_backends("cpu", neighborhood="full"):
        assert re.search(f"cpu +{status.name} +{re.escape(status.reason or 'yes')}", printed)


def test_the_report_says_what_it_takes(capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--help"])
    assert ended.value.code == 0 and "which backend runs" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--json"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and "unrecognized arguments: --json" in said.err and not said.out


def report_with(variable: str, value: str) -> subprocess.CompletedProcess[str]:
    """``python -m natten_ext`` in a process of its own: this one has read the variable already."""
    command = [sys.executable, "-m", "natten_ext"]
    environment = os.environ | {variable: value}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_report_names_the_variable_of_a_library_that_is_missing(tmp_path):
    missing = str(tmp_path / "missing.so")
    done = report_with(cuda.EMULATOR_VARIABLE, missing)
    assert done.returncode == 0 and not done.stderr
    reason = f"{cuda.EMULATOR_VARIABLE} is {re.escape(repr(missing))}, which does not load: .*No such file"
    assert re.search(f"cpu +cuda +{reason}", done.stdout) and re.search("cpu +cpu +yes", done.stdout)


@pytest.mark.parametrize("variable", ["NATTEN_EXT_BACKEND", "NATTEN_EXT_CPU_ISA"])
def test_the_report_refuses_a_variable_that_every_call_refuses(variable):
    done = report_with(variable, "nonsense")
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(f"error: {variable} must be one of .*, got '?nonsense'?\n", done.stderr)


def test_a_kernel_repository_loads_beside_the_package(tmp_path):
    """By Hugging Face's `kernels` where that is installed, else by what its loader does."""
    variant = hub_kernel.make(tmp_path / "repository")
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if importlib.util.find_spec("kernels"):
        package = importlib.import_module("kernels").get_local_kernel(tmp_path / "repository")
    else:
        specification = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        package = sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(package)
    assert set(package.__all__) == set(natten_ext.__all__)

    q, k, v = (torch.randn(1, 5, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = natten_ext.neighborhood_attention(q, k, v, 3, backend="cpu")
    torch.testing.assert_close(package.neighborhood_attention(q, k, v, 3), expected)
    reasons = {status.name: status.reason for status in package.list_backends("cpu")}
    assert "kernels" in reasons["cpu"] and "kernels" in reasons["cuda"]
    if not reasons["triton"]:  # in the interpreter
        torch.testing.assert_close(package.neighborhood_attention(q, k, v, 3, backend="triton"), expected)
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def test_a_kernel_repository_is_not_written_over_anything(tmp_path):
    with pytest.raises(FileExistsError):
        hub_kernel.make(tmp_path)
