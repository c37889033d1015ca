"""The folders of `gans`: who may import whom, and names that can be found."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gans

ROOT = Path(gans.__file__).parent
FOLDERS = re.findall(r"^- `(\w+)`", gans.__doc__ or "", re.MULTILINE)
FILES = sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The folders of `gans` that a file imports from, in functions too."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
    return {module.split(".")[1] for module in modules if module.startswith("gans.")}


def test_folders_import_what_stands_above_them():
    assert {path.name for path in ROOT.iterdir() if path.is_dir()} - {"__pycache__"} == set(FOLDERS)
    for place, folder in enumerate(FOLDERS):
        for path in (ROOT / folder).glob("*.py"):
            assert imported(path) <= set(FOLDERS[: place + 1]), path


def test_no_name_twice():
    # gans/demo.py is what `python -m gans.demo` starts: the command of that name.
    names = Counter(path.name for path in FILES if path.name != "__init__.py" and path != ROOT / "demo.py")
    tests = Path(__file__).parent.rglob("*.py")
    names += Counter(path.name for path in tests if path.name not in ("__init__.py", "conftest.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_importing_the_package_changes_nothing():
    code = "import os, sys; before = dict(os.environ); import gans; print(before == dict(os.environ), *sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout.split()
    assert shown[0] == "True" and not [name for name in shown if name.startswith(("gans.", "torch"))]
