"""What only a GPU can show: large problems bit for bit, CUDA graphs, streams, devices, the compiler's code."""

from __future__ import annotations

import pytest
import torch

from tests.operators.budget import assert_same_bits, assert_within_budget
from tests.operators.cases import (
    Case,
    Inputs,
    cotangents_of,
    derivatives,
    forward,
    grad_output_of,
    inputs_of,
    oracle_derivatives,
)
from tests.operators.formulas import terms

pytestmark = pytest.mark.gpu

# Borders, residue classes of unequal length, odd token counts, head_dims that are no power of two.
ODD = [
    Case("odd-na", "neighborhood", (1, 15, 17, 2, 32), kernel=7, dilation=(1, 2), groups=("dilation",), bias=True),
    Case(
        "odd-na-narrow", "neighborhood", (1, 14, 15, 2, 8), kernel=7, dilation=(1, 2), groups=("dilation",), bias=True
    ),
    Case("odd-grid", "grid", (1, 10, 10, 2, 24), window=5, bias=True),
    Case("odd-grid-narrow", "grid", (1, 16, 16, 1, 4), window=16, bias=True),
    Case("odd-grid-16", "grid", (2, 32, 48, 3, 16), window=16, bias=True),
    Case("odd-l2", "full", (1, 65, 2, 72), score="l2", tied=("key",)),
    Case("odd-cross", "full", (1, 70, 2, 96), keys=64),
]
# Enough blocks to fill a device.
LARGE = [
    Case("nat-64", "neighborhood", (8, 64, 64, 16, 32), kernel=7, dilation=(1, 8), groups=("dilation",), bias=True),
    Case("church-g5", "grid", (16, 128, 128, 4, 16), window=16, bias=True),
    Case("church-g6", "grid", (16, 256, 256, 4, 4), window=16, bias=True),
    Case("cifar-d1", "grid", (64, 16, 16, 4, 72), window=16, bias=True),
    Case("vitgan-d", "full", (128, 65, 6, 64), score="l2", tied=("key",)),
    Case("l2-1k", "full", (8, 1024, 8, 64), score="l2"),
    Case("cross-1024", "full", (16, 1024, 4, 256), keys=64),
]
RUNS = {torch.bfloat16: 100, torch.float16: 25, torch.float32: 25}


@pytest.fixture(autouse=True)
def _on_a_gpu(target) -> None:
    if target.device != "cuda":
        pytest.skip("needs a GPU")


def solve(
    case: Case, target, inputs: Inputs, given: tuple[torch.Tensor, Inputs] | None = None, order: int = 2
) -> Inputs:
    """All results up to an order; ``given``: the incoming gradient and the cotangents, already on the device."""
    grad_output, cotangents = given or (grad_output_of(case, inputs["query"]), cotangents_of(case, inputs))
    return derivatives(lambda leaves: forward(case, leaves, target.backend), inputs, grad_output, cotangents, order)


@pytest.mark.cases(LARGE)
@pytest.mark.parametrize("dtype", RUNS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_large_problems_give_the_same_bits(target, case, dtype):
    target.skip_unless_can(dtype, case.head_dim)
    inputs = inputs_of(case, dtype, target.device)
    given = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    first = solve(case, target, inputs, given)
    for _ in range(1, RUNS[dtype]):
        assert_same_bits(solve(case, target, inputs, given), first)


@pytest.mark.cases(ODD)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_captured_in_a_graph_and_replayed_on_new_data(target, case, order):
    dtype = torch.bfloat16
    target.skip_unless_can(dtype, case.head_dim)
    inputs = inputs_of(case, dtype, target.device)
    given = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            solve(case, target, inputs, given, order)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve(case, target, inputs, given, order)
    for tensor in (*inputs.values(), given[0], *given[1].values()):
        tensor.copy_(tensor.flip(1))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, solve(case, target, inputs, given, order))


@pytest.mark.cases(ODD[:3])
def test_inputs_that_arrive_late_on_a_side_stream(target, case):
    dtype = torch.bfloat16
    target.skip_unless_can(dtype, case.head_dim)
    inputs = inputs_of(case, dtype, target.device)
    given = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    expected = solve(case, target, inputs, given)
    late = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # some 10 ms: a kernel on another stream would see the zeros
        for name, tensor in late.items():
            tensor.copy_(inputs[name])
        results = solve(case, target, late, given)
    side.synchronize()
    assert_same_bits(results, expected)


@pytest.mark.cases(ODD[:3])
def test_a_device_that_is_not_the_current_one(target, case):
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    if last.index == torch.cuda.current_device():
        pytest.skip("one GPU")
    inputs = inputs_of(case, torch.float32, target.device)
    there = solve(case, target, {name: tensor.to(last) for name, tensor in inputs.items()})
    assert_same_bits({name: tensor.to(target.device) for name, tensor in there.items()}, solve(case, target, inputs))


@pytest.mark.cases(ODD)
def test_compiled_in_half_precision(target, case):
    """Forward and backward, with work before and after the operator for the compiler to fuse."""
    dtype = torch.bfloat16
    target.skip_unless_can(dtype, case.head_dim)
    torch._dynamo.reset()
    inputs = inputs_of(case, dtype, target.device)
    grad_output = grad_output_of(case, inputs["query"])

    @torch.compile(fullgraph=True)
    def attend(leaves: Inputs) -> torch.Tensor:
        return forward(case, {name: leaf * 1 for name, leaf in leaves.items()}, target.backend) * 1

    results = derivatives(attend, inputs, grad_output, order=1)
    on_cpu = {name: tensor.cpu().double() for name, tensor in inputs.items()}
    truth = oracle_derivatives(case, inputs, grad_output, order=1)
    plain = oracle_derivatives(case, inputs, grad_output, order=1, dtype=dtype)
    absolute = terms(case, on_cpu, grad_output.cpu().double(), cotangents_of(case, on_cpu))
    assert_within_budget(results, [plain], truth, absolute, dtype)
