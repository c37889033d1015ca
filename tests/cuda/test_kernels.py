"""What the operator tests do not reach: how work is cut, the barriers inside kernels, TF32."""

from __future__ import annotations

import pytest
import torch

import natten_ext
from tests.cuda import emulated
from tests.operators import test_log_sum_exp
from tests.operators.budget import assert_equal_to_rounding, assert_same_bits
from tests.operators.cases import (
    Case,
    cotangents_of,
    derivatives,
    find,
    forward,
    grad_output_of,
    inputs_of,
    magnitude,
    oracle_derivatives,
)
from tests.operators.conftest import Target
from tests.operators.test_forward_mode import tangent_of

pytestmark = emulated.NEEDED

# Several tiles in both directions, halos larger than a piece, dilated classes of different sizes.
LARGER = [
    Case("full", "full", (1, 75, 1, 8), keys=90, score="l2"),
    Case("grid", "grid", (1, 12, 24, 1, 8), window=12, bias=True),
    Case("grid-small-windows", "grid", (1, 12, 12, 2, 8), window=(4, 2), score="l2", bias=True),
    Case("na", "neighborhood", (1, 13, 21, 2, 8), kernel=(5, 3), dilation=(1, 2), groups=("dilation",), bias=True),
    # Tiles are 64 queries of a line, whose own rows share entries of the table.
    Case("line", "neighborhood", (1, 75, 2, 8), kernel=(9, 30), stride=(4, 1), groups=("kernel", "stride"), bias=True),
    # Pieces of a halo are planes, or parts of one.
    Case(
        "volume",
        "neighborhood",
        (1, 3, 5, 9, 1, 4),
        kernel=(2, 4, 5),
        stride=(1, 3, 1),
        causal=(True, False, False),
        bias=True,
        score="l2",
    ),
]
# A window wider than a block of eight keys: nothing is folded, and diagonals of a table's gradient stay apart.
WIDE_WINDOW = Case("na-wide-window", "neighborhood", (1, 5, 20, 1, 4), kernel=(2, 9), bias=True)


def truth(case: Case, dtype: torch.dtype):
    inputs = inputs_of(case, dtype)
    return oracle_derivatives(case, inputs, grad_output_of(case, inputs["query"]), cotangents_of(case, inputs))


@pytest.mark.parametrize("case", [*LARGER, WIDE_WINDOW], ids=str)
def test_several_tiles(case):
    assert_equal_to_rounding(emulated.solve(case, torch.float64), truth(case, torch.float64))


@pytest.mark.parametrize("case", LARGER, ids=str)
@pytest.mark.parametrize("shared_limit", [24 * 1024, 16 * 1024])
def test_little_shared_memory(case, shared_limit):
    """Many pieces, two stages deep or one, one or two warps, tables in global memory where they do not fit."""
    with emulated.settings(shared_limit=shared_limit):
        results = emulated.solve(case, torch.float32)
    inputs = truth(case, torch.float32)
    for name, true in inputs.items():
        error = magnitude([results[name].double() - true])
        assert error <= 1e-5 * max(1.0, magnitude([true])), name


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_log_sum_exp_and_tangents_alone_in_many_pieces(case):
    inputs = inputs_of(case)
    tangents = cotangents_of(case, inputs)
    with emulated.settings(shared_limit=48 * 1024):
        test_log_sum_exp.compare(Target("cuda", "cpu"), case, inputs)
        result = tangent_of(test_log_sum_exp.fused(case, "cuda"), inputs, tangents)
    assert_equal_to_rounding({"t": result}, {"t": test_log_sum_exp.true_tangent(case, inputs, tangents)}, 1e-12)


def test_too_little_shared_memory_is_an_error():
    case = Case("wide", "full", (1, 5, 1, 200))
    with (
        emulated.settings(shared_limit=4096),
        pytest.raises(RuntimeError, match=r"must be at most 0 .*got 200"),
    ):
        emulated.solve(case, torch.float32)
    inputs = inputs_of(case, torch.float32)
    arguments = *inputs.values(), None, [0], False, 1.0, False, False
    with emulated.settings(shared_limit=4096), pytest.raises(RuntimeError, match=r"head_dim 200.*4096 bytes"):
        torch.ops.natten_ext_cuda.forward_kernels(*arguments)


# What a block has on GPUs of compute capability 8.6, 8.9 and 12.0.
LEAST_LIMIT = 99 * 1024


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_fits_the_smallest_gpus_is_said_beforehand(dtype):
    """All orders of every head_dim, but for float64 of more than 128 channels."""
    with emulated.settings(shared_limit=LEAST_LIMIT):
        cannot = [
            head_dim
            for head_dim in range(1, 257)
            for status in natten_ext.list_backends("cpu", getattr(torch, dtype), head_dim)
            if status.name == "cuda" and not status.available
        ]
    assert cannot == (list(range(129, 257)) if dtype == "float64" else [])


@pytest.mark.samples(emulated=5)
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("float64", 33), ("float64", 128), ("float32", 256), ("bfloat16", 256)]
)
@pytest.mark.parametrize("score", ["dot", "l2"])
@pytest.mark.parametrize("kernel", [3, (1, 30)], ids=["small-table", "large-table"])
def test_what_is_said_to_fit_does(dtype, head_dim, score, kernel):
    """With all cotangents and a table: with no more shared memory than is said to be needed."""
    case = Case("fits", "neighborhood", (1, 3, 32, 1, head_dim), kernel=kernel, bias=True, score=score)
    needed, _ = torch.ops.natten_ext_cuda.shared_memory(dtype, head_dim, 0)
    dtype = getattr(torch, dtype)
    with emulated.settings(shared_limit=needed):
        results = emulated.solve(case, dtype)
    allowed = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for name, true in truth(case, dtype).items():
        assert magnitude([results[name].double() - true]) <= allowed * max(1.0, magnitude([true])), name


@pytest.mark.parametrize("case", LARGER[1:], ids=str)
def test_blocks_with_several_tiles(case):
    """With a table gradient a block goes over many tiles; here all blocks of a head are one."""
    with emulated.settings(table_blocks=1):
        assert_equal_to_rounding(emulated.solve(case, torch.float64), truth(case, torch.float64))


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_bits_do_not_depend_on_the_order_of_warps(case):
    with emulated.settings(shared_limit=24 * 1024):
        ascending = emulated.solve(case, torch.bfloat16)
    with emulated.settings(shared_limit=24 * 1024, order=1):
        assert_same_bits(emulated.solve(case, torch.bfloat16), ascending)


def test_a_line_may_be_long_and_lie_along_any_axis():
    """This one is longer than the kernels for maps count."""
    line = torch.randn(1, 65600, 1, 1, 1)
    results = [natten_ext.neighborhood_attention(line, line, line, (3, 1), backend=b) for b in ("cuda", "cpu")]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("head_dim", [4, 8, 16, 33, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_padded_widths(head_dim, dtype):
    """One product of half the depth for heads of up to 8 channels, several whole ones for wider."""
    case = Case("width", "neighborhood", (1, 3, 11, 1, head_dim), kernel=3, bias=True)
    results = emulated.solve(case, dtype)
    for name, true in truth(case, dtype).items():
        assert magnitude([results[name].double() - true]) <= 3e-2 * max(1.0, magnitude([true])), name


@pytest.mark.parametrize("head_dim", [200, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_wide_heads(head_dim, dtype):
    """Results in several blocks of channels. In float32 the table is summed in global memory, by one of them."""
    case = Case("wide", "neighborhood", (1, 5, 6, 1, head_dim), kernel=3, bias=True, score="l2", scale=1 / head_dim)
    results = emulated.solve(case, dtype)
    allowed = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for name, true in truth(case, dtype).items():
        assert magnitude([results[name].double() - true]) <= allowed * max(1.0, magnitude([true])), name


@pytest.mark.parametrize("case", [find("full-cross-13x29", score="l2"), find("na-9x10-kernels", bias=True)], ids=str)
def test_tf32_where_torch_allows_it(case, tf32):
    """Errors are those of 10 bits of mantissa: larger than float32's, smaller than bfloat16's."""
    results = emulated.solve(case, torch.float32)
    errors = []
    for name, true in truth(case, torch.float32).items():
        errors.append(magnitude([results[name].double() - true]) / max(1.0, magnitude([true])))
        assert errors[-1] <= 4e-3, name
    assert max(errors) > 1e-5


@pytest.mark.parametrize("strange", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("name", ["key", "value", "grad_output", "cot_query", "cot_value"])
@pytest.mark.parametrize("mode", ["bfloat16", "float16", "tf32", "float32"])
def test_matrix_units_do_not_spread_nan(request, mode, name, strange):
    """They multiply what is masked by zero. What is not finite in float32 is all that may not be finite here."""
    if mode == "tf32":
        request.getfixturevalue("tf32")
    case = Case("nan", "neighborhood", (1, 6, 17, 1, 8), kernel=3, bias=True)
    inputs = inputs_of(case, torch.float32 if mode == "tf32" else getattr(torch, mode))
    operands = inputs | {"grad_output": grad_output_of(case, inputs["query"])}
    operands |= {f"cot_{n}": x for n, x in cotangents_of(case, inputs).items()}
    operands[name][0, 2, 9, 0, 1] = strange

    def solve(operands, backend):
        cotangents = {n: operands[f"cot_{n}"] for n in inputs}
        leaves = {n: operands[n] for n in inputs}
        return derivatives(lambda leaves: forward(case, leaves, backend), leaves, operands["grad_output"], cotangents)

    results, expected = solve(operands, "cuda"), solve({n: x.float() for n, x in operands.items()}, "reference")
    for label, result in results.items():
        assert torch.equal(result.isfinite(), expected[label].isfinite()), label


# Small problems that together pass every barrier and wait.
PASSING_ALL = [
    ({}, Case("full", "full", (1, 20, 1, 8), keys=150, score="l2"), torch.float32),
    ({"shared_limit": 24 * 1024}, LARGER[1], torch.bfloat16),
    (
        {"table_blocks": 1},
        Case("na", "neighborhood", (1, 8, 16, 1, 8), kernel=5, bias=True, score="l2"),
        torch.bfloat16,
    ),
    # The second tile of the second residue class is empty, and a block has no other.
    ({}, Case("na", "neighborhood", (1, 2, 17, 1, 8), kernel=(1, 3), dilation=(1, 2), bias=True), torch.bfloat16),
    ({}, Case("line", "neighborhood", (1, 20, 1, 8), kernel=9, causal=True, bias=True), torch.bfloat16),
]


def solve_all(dropped_site: str = "") -> list:
    results = []
    for settings, case, dtype in PASSING_ALL:
        with emulated.settings(**settings, dropped_site=dropped_site):
            results.append(emulated.solve(case, dtype))
    return results


def goes_unnoticed(dropped_site: str, expected: list) -> bool:
    try:
        for results, same in zip(solve_all(dropped_site), expected, strict=True):
            assert_same_bits(results, same)
    except (RuntimeError, AssertionError):
        return False
    return True


def test_every_barrier_and_every_wait_is_needed():
    """Without any one of them, the emulator reports a race, a copy under way, or NaN from poisoned memory."""
    torch.ops.natten_ext_cuda.sites()
    expected = solve_all()
    sites = torch.ops.natten_ext_cuda.sites().split()
    assert len(sites) >= 10, sites
    assert not [site for site in sites if goes_unnoticed(site, expected)]
