"""The derivative of the output along tangents of the inputs, alone: `docs/double_backward.md`.

`test_accuracy.py` has the error budget of every case; here is what only this order can get wrong.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from tests.operators.budget import largest_error
from tests.operators.cases import (
    Case,
    Inputs,
    arguments_of,
    cotangents_of,
    find,
    inputs_of,
    magnitude,
    nonempty_subsets,
    oracle_forward,
    tangent,
)
from tests.operators.oracle import pair_tables, table_index

# Rows of more keys than are kept in the cache, which are passed over once. Float64 keeps half as many as float32.
LONG = Case("tangent-long", "full", (2, 40, 2, 5), keys=2500)
LONG_GRID = Case("tangent-long-grid", "grid", (1, 33, 32, 1, 4), window=(33, 32), bias=True)
# Rows of several blocks of keys that are kept.
KEPT = Case("tangent-kept", "full", (1, 40, 1, 4), keys=300)
SHORT = [
    Case("tangent-short", "full", (1, 7, 2, 16), keys=13, small=True),
    Case("tangent-grid", "grid", (1, 6, 10, 2, 4), window=(3, 5), bias=True, small=True),
    Case("tangent-dense-na", "neighborhood", (2, 6, 8, 1, 8), kernel=(4, 3), bias=True, small=True),
    Case("tangent-na", "neighborhood", (1, 11, 13, 2, 12), kernel=(4, 3), dilation=(1, 2), bias=True, small=True),
]

# Times the plain formula's error, as in test_conditioning.py.
FACTOR = {"dot": 1.5, "l2": 3}


def truth(case: Case, inputs: Inputs, tangents: Inputs) -> Tensor:
    """By forward-mode automatic differentiation of the oracle in float64, from inputs of any precision."""
    point = {n: x.cpu().double() for n, x in inputs.items()}
    direction = {n: tangents[n].cpu().double() if n in tangents else torch.zeros_like(x) for n, x in point.items()}
    return jvp(lambda tensors: oracle_forward(case, tensors), (point,), (direction,))[1]


def two_passes(case: Case, inputs: Inputs, tangents: Inputs) -> Tensor:
    """The plain formula of one image in the precision of its inputs: X whole, then its mean, then the differences."""
    q, k, v, table = (None if x is None else x.cpu() for x in arguments_of(case, inputs))
    to_q, to_k, to_v, to_table = (None if x is None else x.cpu() for x in arguments_of(case, tangents))
    q, k, v, to_q, to_k, to_v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v, to_q, to_k, to_v))
    pairs = zip(*(pair_tables(sets, k.shape[2]) for sets in case.neighbors), strict=True)
    allowed, offsets = (torch.stack(tensors, -3) for tensors in pairs)
    l2 = case.score == "l2"
    a = case.effective_scale * (2 if l2 else 1)
    scores, x = a * (q @ k.mT), a * (to_q @ k.mT + q @ to_k.mT)
    if l2:
        scores, x = scores - a / 2 * k.square().sum(-1).unsqueeze(-2), x - a * (to_k * k).sum(-1).unsqueeze(-2)
    if table is not None:
        at = torch.arange(case.heads).view(-1, 1, 1), table_index(offsets, table)
        scores, x = scores + table.flatten(1)[at], x + to_table.flatten(1)[at]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    x = x.masked_fill(~allowed, 0)
    r = (weights * x).sum(-1, keepdim=True)
    return ((weights * (x - r)) @ v + weights @ to_v).transpose(1, 2).reshape(case.shape)


@pytest.mark.cases(
    [
        find("full-cross-13x29", score="l2"),
        find("full-self-9", score="l2", tied=("key",)),
        find("grid-6x10-w3x5", score="l2", bias=True),
        find("na-9x10-kernels", bias=True),
        find("na-11x9-per-head", score="l2", bias=True),
        find("na-7x9-k3"),
    ]
)
def test_every_subset_of_tangents(target, case):
    target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case, device=target.device)
    for names in nonempty_subsets(inputs)[:: 5 if target.slow else 1]:
        given = {n: x for n, x in cotangents_of(case, inputs).items() if n in names}
        result, true = tangent(case, inputs, given, target.backend), truth(case, inputs, given)
        assert largest_error(result, true) <= 1e-12 * max(1, magnitude([true])), names


def test_without_any_tangent_it_is_zero(target):
    for case in (SHORT[0], SHORT[3]):
        inputs = inputs_of(case, torch.float32, target.device)
        assert magnitude([tangent(case, inputs, {}, target.backend)]) == 0


@pytest.mark.cases([replace(case, score=score) for case in (LONG, LONG_GRID) for score in ("dot", "l2")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("absent", [None, "query", "key", "value"])
def test_rows_that_are_passed_over_once(target, case, absent, dtype):
    if case.kind == "grid" and (absent is not None or dtype != torch.float64):
        pytest.skip("one is enough")
    inputs = inputs_of(case, dtype, target.device)
    given = {n: x for n, x in cotangents_of(case, inputs).items() if n != absent}
    result, true = tangent(case, inputs, given, target.backend), truth(case, inputs, given)
    # The sizes of what cancels: about those of the result.
    assert largest_error(result, true) <= 20 * torch.finfo(dtype).eps * magnitude([true])


@pytest.mark.cases([LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_rows_whose_first_keys_have_no_weight(target, case, dtype):
    """The mean that X is counted from is found where there is weight; values lie far from zero."""
    inputs = inputs_of(case, dtype, target.device)
    inputs["query"][..., 0] = 4
    inputs["key"][:, :400, :, 0] = -1000
    inputs["value"] += 30
    given = cotangents_of(case, inputs)
    given["key"][:, 400:, :, 0] += 64  # X of all that have weight
    result, true = tangent(case, inputs, given, target.backend), truth(case, inputs, given)
    plain = two_passes(case, *({n: x.float() for n, x in tensors.items()} for tensors in (inputs, given)))
    allowed = 2 * largest_error(plain, true) + torch.finfo(dtype).eps * magnitude([true])
    assert largest_error(result, true) <= allowed


@pytest.mark.cases([replace(case, score=score) for case in (*SHORT, KEPT, LONG) for score in ("dot", "l2")])
def test_an_offset_of_x_costs_no_digits(target, case):
    """What all X of a row have in common falls out; it may cost what it costs the formula of two passes."""
    inputs = inputs_of(case, torch.float32, target.device)
    given = cotangents_of(case, inputs)
    if case.bias:
        given["bias"] += 1e4
    elif case.score == "dot":
        given["key"] += 1e4 / case.head_dim
        inputs["query"] += 1
    else:  # X is a product of differences, a (gQ - gK).(K - Q)
        given["query"] += 1e4 / case.head_dim
        inputs["key"] += 1
    true = truth(case, inputs, given)
    result, plain = tangent(case, inputs, given, target.backend), two_passes(case, inputs, given)
    # cpu counts X from one of the row's, the others from zero, and add up in the order of their threads.
    factor = FACTOR[case.score] * (1 if target.backend == "cpu" else 2)
    assert largest_error(result, true) <= factor * largest_error(plain, true)
