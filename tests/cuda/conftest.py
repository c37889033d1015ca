"""Loads the ``cuda`` backend under its emulator; the cases and the oracle are those of the operator tests."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "natten_ext"))

if not torch.cuda.is_available():
    import emulator

    emulator.use()
