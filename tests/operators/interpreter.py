"""Triton's interpreter for the tests of the ``triton`` backend on a machine without a GPU, with less overhead.

``use`` must run before anything imports Triton: kernels are made for the interpreter or for a GPU when they are
defined.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def use() -> None:
    """Interpret Triton's kernels in this process, if Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    # Checks of every integer operation for overflow take half of the time.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)

    def create_dot(a, b, d, *options):
        """Products as on a GPU: a number depends on its row and column alone. BLAS sums by the shape of the operands,
        so that two kernels with other tiles would have other scores."""
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    builder.create_dot = create_dot


def python_without_interpreter(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process that interprets Triton's kernels only if ``environment`` says so."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )


class _Patched:
    """Nothing to restore: a caller further out does."""

    def restore(self) -> None:
        pass


def _patch_once(patch_lang):
    """Triton patches its language module in every nested call again; the outermost one is enough."""
    active: set[int] = set()

    class Scope:
        def __init__(self, inner, module: int) -> None:
            self.inner = inner
            active.add(module)

        def restore(self) -> None:
            # Only the outermost does, and with it what calls from other modules patched.
            active.clear()
            self.inner.restore()

    def patch(function):
        module = id(function.__globals__)
        return _Patched() if module in active else Scope(patch_lang(function), module)

    return patch
