"""`merge_attention`: attention over parts of the keys, merged, is attention over all of them, to every order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import natten_ext
from tests.operators.budget import assert_equal_to_rounding
from tests.operators.cases import Case, Inputs, cotangents_of, derivatives, inputs_of, on, random


def gradients(target, case: Case, inputs: Inputs, attend, whole) -> None:
    """Value, first and second derivatives of both results of `attend`, which are those of `whole`."""

    def both(function):
        def of(tensors: Inputs) -> Tensor:
            output, lse = function(*tensors.values())
            return torch.cat([output, lse.unsqueeze(-1)], -1)

        return of

    y = random(case, "merged", (*case.shape[:-1], case.head_dim + 1), torch.float64, "cpu")
    cotangents = cotangents_of(case, inputs)
    results = derivatives(both(attend), on(target, inputs), y.to(target.device), on(target, cotangents))
    assert_equal_to_rounding(results, derivatives(both(whole), inputs, y, cotangents), 1e-12)


@pytest.mark.parametrize("score", ["dot", "l2"])
@pytest.mark.parametrize("sizes", [(13,), (5, 8), (1, 11, 1)], ids=str)
def test_parts_of_the_keys_make_the_whole(any_target, score, sizes):
    any_target.skip_unless_can(torch.float64)
    case = Case("merged", "full", (2, 6, 2, 8), keys=13, score=score)

    def parts(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(key.split(sizes, 1), value.split(sizes, 1), strict=True)
        options = {"score": score, "backend": any_target.backend, "return_lse": True}
        return natten_ext.merge_attention(
            *zip(*(natten_ext.attention(query, *p, **options) for p in pairs), strict=True)
        )

    gradients(any_target, case, inputs_of(case), parts, whole_of(score))


def whole_of(score: str):
    return lambda q, k, v: natten_ext.attention(q, k, v, score=score, backend="reference", return_lse=True)


def test_registers_beside_a_neighborhood(any_target):
    """Keys that every query sees beside its neighborhood; with the window as large as the map, it is full attention."""
    any_target.skip_unless_can(torch.float64)
    case = Case("registers", "neighborhood", (2, 3, 4, 2, 8), kernel=(3, 4))
    inputs = inputs_of(case)
    inputs |= {n: random(case, n, (2, 5, 2, 8), torch.float64, "cpu") for n in ("more keys", "more values")}
    options = {"backend": any_target.backend, "return_lse": True}

    def registers(query, key, value, more_keys, more_values):
        near = natten_ext.neighborhood_attention(query, key, value, (3, 4), **options)
        far, lse = natten_ext.attention(query.flatten(1, 2), more_keys, more_values, **options)
        far = far.unflatten(1, query.shape[1:3]), lse.unflatten(1, query.shape[1:3])
        return natten_ext.merge_attention(*zip(near, far, strict=True))

    def whole(query, key, value, more_keys, more_values):
        keys, values = torch.cat([key.flatten(1, 2), more_keys], 1), torch.cat([value.flatten(1, 2), more_values], 1)
        output, lse = whole_of("dot")(query.flatten(1, 2), keys, values)
        return output.unflatten(1, (3, 4)), lse.unflatten(1, (3, 4))

    gradients(any_target, case, inputs, registers, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_dtypes(any_target, dtype):
    any_target.skip_unless_can(dtype)
    query, key, value = torch.randn(3, 1, 30, 2, 16, dtype=dtype, device=any_target.device)
    options = {"backend": any_target.backend, "return_lse": True}
    parts = [natten_ext.attention(query, key[:, s], value[:, s], **options) for s in (slice(9), slice(9, None))]
    output, lse = natten_ext.merge_attention(*zip(*parts, strict=True))
    whole = natten_ext.attention(query.double(), key.double(), value.double(), backend="reference", return_lse=True)
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    assert (output.double() - whole[0]).abs().max() <= 4 * torch.finfo(dtype).eps * whole[0].abs().max()
    assert (lse.double() - whole[1]).abs().max() <= 1e-5


def test_rows_without_keys_do_not_count():
    """Their outputs are NaN, as those of a row of scores of minus infinity."""
    outputs, lses = torch.randn(3, 2, 5, 8).double(), torch.randn(3, 2, 5).double()
    expected = natten_ext.merge_attention(list(outputs[:2]), list(lses[:2]))
    outputs[2], lses[2] = torch.nan, -torch.inf
    outputs.requires_grad_(), lses.requires_grad_()
    output, lse = natten_ext.merge_attention(list(outputs), list(lses))
    assert torch.equal(output, expected[0]) and torch.equal(lse, expected[1])
    grads = torch.autograd.grad((output.sin().sum() + lse.sin().sum()), [outputs, lses])
    assert all(grad.isfinite().all() and not grad[2].any() for grad in grads)
    output, lse = natten_ext.merge_attention([outputs[2]] * 2, [lses[2]] * 2)
    assert output.isnan().all() and (lse == -torch.inf).all()


def test_it_does_not_overflow():
    outputs, lses = list(torch.eye(2)), [torch.tensor(1e30), torch.tensor(1e30)]
    assert natten_ext.merge_attention(outputs, lses)[0].tolist() == [0.5, 0.5]
