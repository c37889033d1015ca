"""The CUDA emulator for the tests of the ``cuda`` backend on a machine without a GPU: built once, then loaded.

``use`` must run before anything asks which backends there are.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulator"


def use() -> None:
    """Run the ``cuda`` backend under the emulator here, unless only other backends are tested."""
    wanted = os.environ.get("NATTEN_EXT_TEST_BACKENDS", "")
    if wanted and "cuda" not in wanted.split(","):
        return
    if not os.environ.get("NATTEN_EXT_CUDA_EMULATOR"):
        sys.path.insert(0, str(ROOT))
        import setup_cuda

        os.environ["NATTEN_EXT_CUDA_EMULATOR"] = str(setup_cuda.build_emulator(FOLDER))
