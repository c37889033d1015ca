"""Heads that share key heads: what operators are given, and what they refuse.

The values are those of the cases ``shared-...`` of ``cases.py``, in other tests.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import natten_ext
from natten_ext.backends.choice import SHARING
from natten_ext.geometry import Full, Grid
from natten_ext.operators import OPERATORS
from natten_ext.orders import ORDERS
from tests.operators.budget import assert_equal_to_rounding, assert_same_bits
from tests.operators.cases import (
    Case,
    Inputs,
    cotangents_of,
    derivatives,
    find,
    forward,
    grad_output_of,
    inputs_of,
    oracle_derivatives,
)

SHARED = [
    find("full-shared-11"),
    find("grid-shared-6x4-w3x2", bias=True),
    find("na-shared-9x11-k3", bias=True),
    find("na-shared-6x6-k4", score="l2"),
    find("na-shared-line-29-causal", bias=True),
]
# Heads of one key head with different windows, which operators do not take.
SPLIT = Case(
    "na-split",
    "neighborhood",
    (1, 10, 9, 6, 8),
    kernel=(3, (4, 5)),
    groups=("kernel",),
    bias=True,
    shared=6,
    small=True,
)


class Operators(TorchDispatchMode):
    """The key heads of every call of an operator, of its keys and of their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        for order in ORDERS:
            if str(function).startswith("natten_ext_") and f".{order.name}." in f".{function}.":
                named = [*zip(order.types, arguments, strict=True), *zip(order.results, results, strict=True)]
                of_keys = [x for name, x in named if name.endswith(("key", "value")) and x is not None]
                self.heads += [x.shape[-2] for x in of_keys if x.numel()]
        return results


def solve(case: Case, target) -> Inputs:
    target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case, torch.float64, target.device)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    return derivatives(lambda leaves: forward(case, leaves, target.backend), inputs, grad_output, cotangents)


@pytest.mark.cases(SHARED)
def test_nothing_is_repeated(target, case):
    """Of all orders: keys, their cotangents and their gradients have the heads that they were given with."""
    with Operators() as operators:
        solve(case, target)
    assert len(operators.heads) > 8 and set(operators.heads) == {case.heads // case.shared}


def test_heads_with_windows_of_their_own_share_as_far_as_they_can(target):
    """Six heads with one key head, but two windows: operators get two key heads."""
    with Operators() as operators:
        results = solve(SPLIT, target)
    assert set(operators.heads) == {2}
    inputs = inputs_of(SPLIT)
    true = oracle_derivatives(SPLIT, inputs, grad_output_of(SPLIT, inputs["query"]), cotangents_of(SPLIT, inputs))
    assert_equal_to_rounding({n: x.cpu() for n, x in results.items()}, true)


@pytest.mark.cases(SHARED[2:])
def test_the_same_bits_again(target, case):
    assert_same_bits(solve(case, target), solve(case, target))


def test_operators_refuse_heads_that_cannot_share(target):
    operator = OPERATORS[target.backend].forward
    query, three, one = (torch.randn(1, 6, 6, heads, 8, device=target.device) for heads in (4, 3, 1))
    with pytest.raises((RuntimeError, ValueError), match="key must have heads that divide the query's"):
        operator(query, three, three, None, list(Grid((3, 3)).encode()), False, 1.0, False)
    with pytest.raises((RuntimeError, ValueError), match="heads that share a key head must have one window"):
        code = natten_ext.checks.windows_of(2, 4, [3, 5], 1).encode()
        operator(query, one, one, None, list(code), False, 1.0, False)
    if Full.kind not in SHARING[target.backend]:
        with pytest.raises(RuntimeError, match="a head of keys for every head"):
            operator(query[:, 0], one[:, 0], one[:, 0], None, list(Full().encode()), False, 1.0, False)
