"""Kernels of the triton backend compiled ahead of time: registers suffice, no more shared memory than there is.

To compile every variant of every named shape takes minutes, so a table keeps what came of it
(``benchmarks/results/triton_resources.csv``, made by ``python -m benchmarks.kernels.triton_resources --update``). Here
it is held against what the named shapes launch today, and a sample that has every kernel is compiled again. So a change
of the kernels that costs registers fails here even where the table is from the code before it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.operators.interpreter import python_without_interpreter

pytest.importorskip("triton")

from benchmarks.kernels import triton_usage
from benchmarks.kernels.triton_problems import planned_orders
from benchmarks.shapes import SHAPES
from natten_ext.backends.triton import configs

ROOT = Path(__file__).resolve().parents[2]

# (architecture, shapes, dtypes, kernels)
SAMPLE = [
    (
        "sm_90",
        ["nat-256"],
        "bfloat16",
        [
            "forward",
            "backward_query",
            "backward_key",
            "padded_table",
            "table_shares",
            "table_parts",
            "table_sum",
            "double_query",
            "double_key",
        ],
    ),
    ("sm_80", ["church-d1"], "bfloat16", ["backward_key", "double_query"]),
    ("sm_100", ["l2-1k"], "bfloat16", ["forward", "backward_key", "double_key"]),  # without a table
    # Tiles of 64 rows of 72 channels: with 8 warps, these would read beyond them.
    (
        "sm_90",
        ["cifar-d1"],
        "bfloat16",
        ["backward_key", "double_query"],
    ),
]

# Spills for want of registers that are left, 8 bytes per thread (docs/triton.md).
KNOWN = {("double_query", "sm_90", "bfloat16", "cifar-d2"), ("double_query", "sm_90", "bfloat16", "church-d2")}


def resources(*arguments: str, code: str = "") -> subprocess.CompletedProcess:
    """The command (or other code), in a process that does not interpret kernels."""
    run = ["-c", code] if code else ["-m", "benchmarks.kernels.triton_resources", *arguments]
    return python_without_interpreter(*run)


def test_every_variant_is_in_the_table():
    """What the named shapes launch with the configurations of today, for three architectures, in bfloat16."""
    done = resources("--status")
    groups = [line for line in done.stdout.splitlines() if "compiled from other code" in line]
    assert len(groups) == 3, done.stdout + done.stderr
    assert f" 0 not compiled, {len(KNOWN)} fail" in done.stdout.splitlines()[-1], done.stdout


def test_what_fails_is_known():
    table = triton_usage.read()
    failing = {(usage.kernel, usage.arch, usage.dtype, usage.shape) for usage in table.values() if usage.problem}
    assert failing == KNOWN


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "shapes", "dtype", "kernels"), SAMPLE, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_compiled_again(tmp_path, arch, shapes, dtype, kernels):
    """What the compiler makes of a sample is in the table."""
    path = tmp_path / "usage.json"
    done = resources(
        "--arch", arch, "--shapes", *shapes, "--dtypes", dtype, "--kernels", *kernels,
        "--processes", "2", "--json", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    usages = [triton_usage.Usage(**usage) for usage in json.loads(path.read_text())]
    assert {usage.kernel for usage in usages} == set(kernels)
    assert {usage.arch for usage in usages} == {arch}
    table = triton_usage.read()
    for usage in usages:
        assert not usage.problem and 0 < usage.registers <= 255 and usage.seconds > 0
        entry = table[arch, usage.variant]
        if usage.triton == entry.triton:
            assert usage.resources == entry.resources, f"{usage}, but the table has {entry}: --update"


def test_no_more_warps_than_rows():
    """Configurations say what is launched: at most a warp per 16 rows of tiles of 64 and more (``configs.fitted``)."""
    for section, entries in configs.read().items():
        for key, numbers in entries.items():
            config = configs.Config(*numbers)
            assert configs.fitted(config, config.own) == config, f"{section}: {key}"


def test_small_maps_get_fewer_warps():
    """A window of 8 x 8 has tiles of 64 rows where the configuration says 128."""
    with configs.forced(configs.Config(128, 32, 8, 1)):
        orders = list(planned_orders(SHAPES["cifar-d2"], torch.bfloat16))
    tiles = [launched.options for launch in orders for launched in launch.launches if "S" in launched.options]
    assert len(tiles) == 7
    assert {(options["S"].own_h * options["S"].own_w, options["num_warps"]) for options in tiles} == {(64, 4)}


@pytest.mark.slow
def test_a_layout_beyond_its_tile_is_seen():
    """What an H100 answered with an illegal address."""
    code = (
        "import sys; from benchmarks.kernels import triton_resources\n"
        "from natten_ext.backends.triton import configs\n"
        "configs.fitted = lambda config, rows: config\n"
        "with configs.forced(configs.Config(64, 16, 8, 1)):\n"
        "    sys.exit(triton_resources.main(['--arch', 'sm_90', '--shapes', 'cifar-d1', '--dtypes', 'bfloat16',\n"
        "                                    '--orders', 'double', '--kernels', 'table_shares']))"
    )
    done = resources(code=code)
    assert done.returncode == 1 and "reads beyond a tile: ['128x8 for 64x16']" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_spill_is_seen():
    """A tile that is far too large: the command says so and fails."""
    code = (
        "import sys; from benchmarks.kernels import triton_resources\n"
        "from natten_ext.backends.triton import configs\n"
        "with configs.forced(configs.Config(64, 64, 4, 1)):\n"
        "    sys.exit(triton_resources.main(['--arch', 'sm_80', '--shapes', 'church-g4', '--dtypes', 'bfloat16',\n"
        "                                    '--orders', 'backward', '--kernels', 'backward_key']))"
    )
    done = resources(code=code)
    assert done.returncode == 1 and "FAILS: spills" in done.stdout, done.stdout + done.stderr


def test_constants_of_kernels_are_no_named_tuples():
    """Triton 3.8 and later make tuples of their own of them, without their properties."""
    orders = planned_orders(SHAPES["nat-16"], torch.bfloat16)
    options = [launched.options for launch in orders for launched in launch.launches]
    assert any("S" in of_one for of_one in options)
    assert not any(isinstance(value, tuple) for of_one in options for value in of_one.values())
