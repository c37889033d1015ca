"""Neighborhoods whose heads, batch elements and residue classes the CPU kernels interleave, one per lane of a vector.

Beside the same problems one (batch, head) at a time, which are not. The operator tests with cases have more of them,
against the oracle.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.operators.cases import Case, cotangents_of, derivatives, forward, grad_output_of, inputs_of

CASES = [
    # With all vectors full or not, tables of heads in every order of lanes, and rows that come in parts.
    Case("full-vectors", "neighborhood", (4, 19, 12, 16, 8), kernel=5, bias=True),
    Case("odd-heads", "neighborhood", (19, 11, 9, 7, 12), kernel=(3, 4), bias=True, score="l2"),
    Case("classes", "neighborhood", (3, 25, 29, 5, 8), kernel=3, dilation=(2, 3), bias=True),
    Case("parts", "neighborhood", (1, 9, 150, 16, 64), kernel=(7, 5), bias=True),
]


def one_at_a_time(case: Case, tensors: dict[str, torch.Tensor], batch: int, head: int) -> dict[str, torch.Tensor]:
    return {
        name: tensor[head : head + 1] if name == "bias" else tensor[batch : batch + 1, ..., head : head + 1, :]
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_do_not_depend_on_the_layout(case: Case, dtype: torch.dtype) -> None:
    inputs = inputs_of(case, dtype)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    results = derivatives(lambda leaves: forward(case, leaves, "cpu"), inputs, grad_output, cotangents)
    batches, heads = case.shape[0], case.heads
    alone = replace(case, shape=(1, *case.shape[1:-2], 1, case.shape[-1]))
    for batch, head in {(0, 0), (batches - 1, heads - 1), (batches // 2, heads // 3)}:
        ours = one_at_a_time(case, results, batch, head)
        given = [one_at_a_time(case, tensors, batch, head) for tensors in (inputs, {"o": grad_output}, cotangents)]
        theirs = derivatives(lambda leaves: forward(alone, leaves, "cpu"), given[0], given[1]["o"], given[2])
        for name, result in theirs.items():
            if "bias" in name:  # a sum over the batch, by lanes of another order
                continue
            assert torch.equal(ours[name], result), name


def test_infinity_stays_in_its_head_and_window() -> None:
    case = CASES[0]
    inputs = inputs_of(case, torch.float32)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)

    def run():
        return derivatives(lambda leaves: forward(case, leaves, "cpu"), inputs, grad_output, cotangents)

    before = run()
    inputs["value"][1, 0, 0, 3] = torch.inf
    after = run()
    for name in ("output", "d_query", "d_key", "d_value", "dd_grad_output", "dd_query", "dd_key", "dd_value"):
        changed = (before[name] != after[name]).flatten(-1).any(-1)
        seen = torch.zeros_like(changed)
        seen[1, :10, :10, 3] = True  # queries that see the key, and keys that see these
        assert not (changed & ~seen).any(), name
        assert changed.any() or name in ("d_value", "dd_value"), name


def test_gradients_of_tables_do_not_depend_on_threads() -> None:
    case = CASES[1]
    inputs = inputs_of(case, torch.float32)
    grad_output = grad_output_of(case, inputs["query"])
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(derivatives(lambda leaves: forward(case, leaves, "cpu"), inputs, grad_output, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)
