"""Loads the ``cuda`` backend under its emulator; the cases and the oracle are those of the operator tests."""

from __future__ import annotations

import torch

if not torch.cuda.is_available():
    from tests.cuda import emulator

    emulator.use()
