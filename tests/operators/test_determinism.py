"""The same inputs give the same bits: on repeat, with any number of threads, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from tests.operators.budget import assert_same_bits
from tests.operators.cases import (
    CASES,
    Case,
    Inputs,
    cotangents_of,
    derivatives,
    find,
    forward,
    grad_output_of,
    inputs_of,
)

THREADED = [case for case in CASES if not case.tied] + [case for case in CASES if case.tied][:6]


@pytest.fixture
def own_sums(request) -> None:
    """Of a test of bits that a library of matrix products does not promise."""
    if request.getfixturevalue("target").backend == "matmul":
        pytest.skip("bits of the library's products depend on threads and on the batch")


def solve(case: Case, target, inputs: Inputs) -> Inputs:
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    return derivatives(lambda leaves: forward(case, leaves, target.backend), inputs, grad_output, cotangents)


@pytest.mark.usefixtures("own_sums")
@pytest.mark.cases(THREADED)
def test_bits_do_not_depend_on_the_run_or_the_threads(target, case, threads):
    """Also the test that several threads compute the same as one, which all other tests run with."""
    inputs = inputs_of(case, torch.float32, target.device)
    first = solve(case, target, inputs)
    for number in (2, 1) if target.slow else (1, 2, 3, 2):
        threads(number)
        assert_same_bits(solve(case, target, inputs), first)


@pytest.mark.cases(THREADED)
def test_bits_do_not_depend_on_what_an_earlier_call_left_in_working_memory(target, case):
    """A call on NaN fills working memory with them; multiplied by a weight of zero they would still show."""
    inputs = inputs_of(case, torch.float32, target.device)
    first = solve(case, target, inputs)
    solve(case, target, {name: torch.full_like(tensor, torch.nan) for name, tensor in inputs.items()})
    assert_same_bits(solve(case, target, inputs), first)


LARGER = [
    # Few large jobs, which are split where threads would be idle.
    Case("larger-few", "full", (1, 640, 3, 16), score="l2"),
    Case("larger-few-grid", "grid", (1, 24, 24, 2, 8), window=24, bias=True),
    Case("larger-full", "full", (4, 130, 3, 40)),
    Case("larger-full-l2", "full", (2, 300, 2, 64), score="l2"),
    Case("larger-grid", "grid", (3, 24, 24, 4, 16), window=8, bias=True),
    Case("larger-shared", "full", (1, 300, 8, 16), shared=4),
    Case("larger-shared-grid", "grid", (1, 24, 24, 4, 8), window=24, bias=True, shared=2),
    Case("larger-shared-na", "neighborhood", (1, 70, 28, 6, 16), kernel=7, bias=True, shared=3),
    Case("larger-na", "neighborhood", (2, 30, 28, 4, 32), kernel=7, dilation=(1, 4), groups=("dilation",), bias=True),
]


@pytest.mark.usefixtures("own_sums")
@pytest.mark.cases(LARGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bits_with_work_for_many_threads(target, case, dtype, threads):
    target.skip_unless_can(dtype, case.head_dim)
    inputs = inputs_of(case, dtype, target.device)
    first = solve(case, target, inputs)
    for number in (2, 4, 3, 1):
        threads(number)
        assert_same_bits(solve(case, target, inputs), first)


@pytest.mark.usefixtures("own_sums")
@pytest.mark.cases([find("full-self-9"), find("grid-8x8-w4"), find("na-7x9-k3"), find("na-9x9-dilations", score="l2")])
def test_images_of_a_batch_do_not_touch_each_other(target, case):
    """Outputs and gradients of the maps are those of each image alone; the tables' are their sum."""
    inputs = inputs_of(case, torch.float32, target.device)
    doubled = {n: torch.cat([t, t.flip(0)]) for n, t in inputs.items()}
    wide = Case(case.name, case.kind, (2 * case.shape[0], *case.shape[1:]), **{
        f: getattr(case, f) for f in ("window", "kernel", "dilation", "groups", "score")
    })  # fmt: skip
    cotangents = {n: torch.cat([t, t.flip(0)]) for n, t in cotangents_of(case, inputs).items()}
    grad_output = grad_output_of(case, inputs["query"])
    results = derivatives(
        lambda leaves: forward(wide, leaves, target.backend),
        doubled,
        torch.cat([grad_output, grad_output.flip(0)]),
        cotangents,
    )
    size = case.shape[0]
    for name, alone in solve(case, target, inputs).items():
        assert torch.equal(results[name][:size], alone), name
        assert torch.equal(results[name][size:], alone.flip(0)), name
