"""When calls go by torch's dispatcher (natten_ext.eager), and answers that are kept (natten_ext.remembered)."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import natten_ext
from natten_ext.checks import grid_of, neighborhood_of
from natten_ext.eager import plain
from natten_ext.remembered import of_plain_values


class Subclass(torch.Tensor):
    pass


def test_plain():
    x = torch.randn(2, 3)
    assert plain([x, x.requires_grad_(), torch.nn.Parameter(x), x[1:]])
    with torch.inference_mode():
        assert plain([x, torch.randn(2)])
    with torch.no_grad(), torch.autocast("cpu"):
        assert plain([x])


@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.randn(2).as_subclass(Subclass),
        lambda: torch._neg_view(torch.randn(2)),
        lambda: torch._efficientzerotensor(2),
        lambda: torch.randn(2, device="meta"),
        lambda: torch.randn(2).to_sparse(),
    ],
    ids=["subclass", "negative", "zero", "meta", "sparse"],
)
def test_tensors_that_need_the_dispatcher(tensor):
    assert not plain([torch.randn(2), tensor()])


@pytest.mark.parametrize(
    "mode",
    [
        FakeTensorMode,
        TorchFunctionMode,
        lambda: FlopCounterMode(display=False),
        torch._C._AutoDispatchBelowAutograd,
        torch.profiler.profile,
    ],
    ids=["fake", "function", "dispatch", "below", "profiler"],
)
def test_modes_that_need_the_dispatcher(mode):
    x = torch.randn(2)
    with mode():
        assert not plain([x])
    assert plain([x])


def test_transforms_need_the_dispatcher():
    seen = []
    torch.func.grad(lambda x: (seen.append(plain([x])), x.sum())[1])(torch.randn(2))
    torch.func.vmap(lambda x: (seen.append(plain([x])), x)[1])(torch.randn(2))
    torch.jit.trace(lambda x: (seen.append(plain([x])), x)[1], torch.randn(2), check_trace=False)
    assert seen == [False] * 3


def test_the_profiler_sees_the_operators(target):
    q = torch.randn(1, 4, 4, 1, 8, device=target.device, requires_grad=True)
    with torch.profiler.profile() as profile:
        natten_ext.neighborhood_attention(q, q, q, 3, backend=target.backend).sum().backward()
    names = {event.name for event in profile.events()}
    assert {f"natten_ext_{target.backend}::{order}" for order in ("forward", "backward")} <= names


def test_answers_are_kept_by_type_and_value():
    asked = []

    @of_plain_values
    def answer(*values):
        asked.append(values)
        if values[0] == -1:
            raise ValueError("refused")
        return len(asked)

    assert answer(1, [2, 3]) == answer(1, [2, 3]) == 1
    assert answer(1, (2, 3)) == answer(1, (2, 3)) == 2
    assert answer(True, [2, 3]) == 3
    assert answer(torch.Size((1,))) != answer(torch.Size((1,)))
    for _ in range(2):
        with pytest.raises(ValueError, match="refused"):
            answer(-1)
    assert len(asked) == 7


def test_what_is_wrong_is_refused_after_what_is_right():
    """A kept answer is not that of an equal value of another type."""
    assert neighborhood_of((8, 8), 1, 1, 1) is neighborhood_of((8, 8), 1, 1, 1)
    for wrong in (True, 1.0):
        with pytest.raises(TypeError, match="kernel_size"):
            neighborhood_of((8, 8), 1, wrong, 1)
        with pytest.raises(TypeError, match="kernel_size"):
            neighborhood_of((8, 8), 1, (1, wrong), 1)
    assert grid_of((8, 8), 1).window == (1, 1)
    with pytest.raises(TypeError, match="window_size"):
        grid_of((8, 8), True)
