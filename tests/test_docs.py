"""The docs: the site builds without a broken link, code runs, and what commands name is there.

Examples whose results are looked at are in tests/operators/test_examples.py.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gans.commands.cli import COMMANDS
from gans.features import by_name
from natten_ext import compat
from tests.operators.test_examples import EXAMPLES, MODELS

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.name: path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))
}
BLOCKS = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in sorted(PAGES.items())
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
    if code not in {*EXAMPLES.values(), *MODELS.values()}
]
MISSING = {"load_my_network": lambda: None}
"""What an example leaves to its reader."""


def test_the_site_builds_without_a_broken_link(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neighborhood_attention" in (tmp_path / "api.html").read_text()


@pytest.mark.parametrize("code", BLOCKS)
def test_code_runs(code, monkeypatch):
    monkeypatch.setattr(by_name, "MAPS", {**by_name.MAPS})
    try:
        exec(code, {"__name__": "example", **MISSING})
    finally:
        compat.uninstall()


def named(pattern: str) -> set[str]:
    """What a pattern finds in the lines of the pages that are commands."""
    lines = [line for text in PAGES.values() for line in re.findall(r"^(?: {4}|\$ )(.*)|`([^`\n]+)`", text, re.M)]
    return {found for line in lines for found in re.findall(pattern, "".join(line))}


def test_commands_name_what_is_there():
    assert named(r"python3? -m gans ([a-z-]+)") <= {*COMMANDS}
    modules = named(r"python3? -m ((?:benchmarks|natten_ext)[\w.]*)")
    assert modules and all(importlib.util.find_spec(name) for name in modules)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"test", "wheel", "docs"} <= named(r"^make ([\w-]+)") <= targets


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_order_of_arguments_with_a_bias_is_told(axes):
    """NATTEN's own calls are by position, and the table is not where `na2d_qk` has it."""
    parameters = inspect.signature(getattr(compat, f"na{axes}d_qk_with_bias")).parameters.values()
    order = ", ".join(str(parameter.replace(annotation=parameter.empty)) for parameter in parameters)
    assert f"`({order})`" in PAGES["natten.md"]


def test_every_reason_to_skip_a_test_is_told():
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != "test_gpu_check.py")
    marks = re.findall(r'skipif\(.*reason="([^"]+)"|^    reason="([^"]+)",$', sources, re.M)
    reasons = {*re.findall(r'pytest\.skip\(f?"([^"]+)"', sources), *(mark[0] or mark[1] for mark in marks)}
    section = PAGES["CONTRIBUTING.md"].partition("## Tests that are skipped")[2].partition("\n## ")[0]
    told = set(re.findall(r"`([^`]+)`", section))
    assert len(reasons) > 20 and reasons <= told
    assert not [reason for reason in told if reason not in sources]
