"""The emulator finds what a GPU would leave undefined, and every barrier and wait of the kernels is needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import setup

ROOT = Path(__file__).resolve().parents[2]

FAULTS = {
    "none": "",
    "poison": "",
    "no_wait": "asynchronous copy to it is under way",
    "wait_for_too_few": "asynchronous copy to it is under way",
    "never_waited": "ended with asynchronous copies under way",
    "no_barrier": "race: shared memory",
    "no_barrier_before_a_write": "race: shared memory",
    "two_writers": "race: shared memory written",
    "no_warp_barrier": "race: shared memory",
    "warp_barrier_between_warps": "race: shared memory",
    "divergent_barrier": "deadlock",
    "divergent_shuffle": "deadlock",
    "mixed_collectives": "different operations",
    "shared_out_of_bounds": "shared memory access out of bounds",
    "shared_misaligned": "misaligned access of shared memory",
    "global_out_of_bounds": "global memory read out of bounds",
    "global_misaligned": "misaligned access of global memory",
    "global_read_only": "global memory write out of bounds",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Path:
    """The program of tests/cuda/faults.cpp."""
    program = tmp_path_factory.mktemp("faults") / "faults"
    sources = [ROOT / "tests" / "cuda" / "faults.cpp", ROOT / "csrc" / "emulator" / "machine.cpp"]
    flags = ["-std=c++20", "-O1", "-DNATTEN_EXT_EMULATOR"]
    subprocess.run([*setup.find_compiler().split(), *flags, *map(str, sources), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("name", FAULTS)
def test_every_mistake_is_found(faults, name):
    said = subprocess.run([str(faults), name], capture_output=True, text=True, check=True).stdout.strip()
    if not FAULTS[name]:
        assert said == ""
    else:
        assert FAULTS[name] in said
        assert name.startswith(("never", "divergent")) or "faults.cpp:" in said, "the message names the place"
