"""Kernels of the triton backend compiled ahead of time: registers suffice, no more shared memory than there is.

To compile every variant of every named shape takes minutes, so a table keeps what came of it
(``benchmarks/results/triton_resources.csv``, made by ``python -m benchmarks.kernels.triton_resources --update``). Here
it is held against what the named shapes launch today, and a sample that has every kernel is compiled again. So a change
of the kernels that costs registers fails here even where the table is from the code before it.
"""

from __future__ import annotations

import json
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
    ("sm_80", ["church-d1"], "bfloat16", ["double_query"]),  # needs all registers
    ("sm_100", ["l2-1k"], "bfloat16", ["forward", "backward_key", "double_key"]),  # without a table
    ("sm_90", ["cifar-d1"], "bfloat16", ["backward_key"]),  # with 8 warps, it would read beyond its tiles
]

# Spills for want of registers that are left, 8 bytes per thread (docs/triton.md).
KNOWN = {("double_query", "sm_90", "bfloat16", "cifar-d2"), ("double_query", "sm_90", "bfloat16", "church-d2")}


# Runs the command with some arguments, with a configuration for all kernels, as it is instead of fitted to shapes.
RUNS = """
import contextlib, io, json, sys, traceback
from unittest.mock import patch
from benchmarks.kernels import triton_resources
from natten_ext.backends.triton import configs

for name, (arguments, config, fitted) in json.loads(sys.argv[1]).items():
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if config:
            stack.enter_context(configs.forced(configs.Config(*config)))
        if not fitted:
            stack.enter_context(patch.object(configs, "fitted", lambda config, rows: config))
        try:
            status = triton_resources.main(arguments)
        except RuntimeError as error:
            status = str(error)
    print(json.dumps([name, status, output.getvalue()]))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Exit status or error, what was printed, and the file it wrote, of all runs: in one process, which does not
    interpret kernels."""
    folder = tmp_path_factory.mktemp("resources")
    runs = {"status": (["--status"], None, True)}
    for arch, shapes, dtype, kernels in SAMPLE:
        name = f"{arch}-{shapes[0]}"
        arguments = ["--arch", arch, "--shapes", *shapes, "--dtypes", dtype, "--kernels", *kernels]
        runs[name] = [*arguments, "--processes", "2", "--json", str(folder / name)], None, True
    # A tile that is far too large.
    arguments = ["--arch", "sm_80", "--shapes", "church-g4", "--dtypes", "bfloat16"]
    runs["spill"] = [*arguments, "--orders", "backward", "--kernels", "backward_key"], (64, 64, 4, 1), True
    # What an H100 answered with an illegal address.
    arguments = ["--arch", "sm_90", "--shapes", "cifar-d1", "--dtypes", "bfloat16"]
    runs["beyond"] = [*arguments, "--orders", "double", "--kernels", "table_shares"], (64, 16, 8, 1), False
    done = python_without_interpreter("-c", RUNS, json.dumps(runs))
    assert done.returncode == 0, done.stderr
    found = {}
    for name, status, output in map(json.loads, done.stdout.splitlines()):
        found[name] = status, output, folder / name
    return found


@pytest.mark.slow
def test_every_variant_is_in_the_table(ran):
    """What the named shapes launch with the configurations of today, for three architectures, in bfloat16."""
    _, output, _ = ran["status"]
    groups = [line for line in output.splitlines() if "compiled from other code" in line]
    assert len(groups) == 3, output
    assert f" 0 not compiled, {len(KNOWN)} fail" in output.splitlines()[-1], output


def test_what_fails_is_known():
    table = triton_usage.read()
    failing = {(usage.kernel, usage.arch, usage.dtype, usage.shape) for usage in table.values() if usage.problem}
    assert failing == KNOWN


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "shapes", "dtype", "kernels"), SAMPLE, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_compiled_again(ran, arch, shapes, dtype, kernels):
    """What the compiler makes of a sample is in the table."""
    status, output, path = ran[f"{arch}-{shapes[0]}"]
    assert status == 0, f"{status}\n{output}"
    usages = [triton_usage.Usage(**usage) for usage in json.loads(path.read_text())]
    assert {usage.kernel for usage in usages} == set(kernels)
    assert {(usage.arch, usage.dtype) for usage in usages} == {(arch, dtype)}
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
def test_a_layout_beyond_its_tile_is_seen(ran):
    status, output, _ = ran["beyond"]
    assert "reads beyond a tile: ['128x8 for 64x16']" in str(status), output


@pytest.mark.slow
def test_a_spill_is_seen(ran):
    """The command says so and fails."""
    status, output, _ = ran["spill"]
    assert status == 1 and "FAILS: spills" in output, output


def test_constants_of_kernels_are_no_named_tuples():
    """Triton 3.8 and later make tuples of their own of them, without their properties."""
    orders = planned_orders(SHAPES["nat-16"], torch.bfloat16)
    options = [launched.options for launch in orders for launched in launch.launches]
    assert any("S" in of_one for of_one in options)
    assert not any(isinstance(value, tuple) for of_one in options for value in of_one.values())
