"""Plans of launches (natten_ext.backends.triton.plans): when one is used again, and what it keeps."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import natten_ext
from natten_ext.checks import windows_of
from natten_ext.orders import BACKWARD, FORWARD

plans = pytest.importorskip("natten_ext.backends.triton.plans")
if not plans.INTERPRETED:
    pytest.skip("on a GPU the tests of operators go through plans", allow_module_level=True)

CODE = windows_of(2, 2, 3, [1, 2]).encode()


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setattr(plans, "_plans", {})


def inputs(dtype: torch.dtype = torch.float32, size: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, size, size, 2, 8, generator=generator).to(dtype) for _ in range(3))


def forward(query, key, value, bias=None, scale: float = 0.5, return_lse: bool = False) -> plans.Results:
    return plans.run(FORWARD, (query, key, value, bias, CODE, False, scale, return_lse))


def counted(*arguments, **options) -> int:
    """Plans after a call."""
    forward(*arguments, **options)
    return len(plans._plans)


def test_a_plan_is_used_for_what_is_alike():
    """Other values in other memory; every other difference has a plan of its own."""
    query, key, value = inputs()
    assert counted(query, key, value) == 1
    assert counted(query.clone(), query, query) == 1
    wide = torch.randn(*query.shape[:-1], 16)
    assert counted(wide[..., :8], key, value) == 2
    assert counted(wide[..., 1:9], key, value) == 3, "addresses that are no multiples of 16 bytes"
    assert counted(query, key, value, scale=0.25) == 4
    assert counted(query, key, value, return_lse=True) == 5
    assert counted(*inputs(torch.bfloat16)) == 6
    assert counted(*inputs(size=7)) == 7
    table = torch.zeros(2, 5, 5)
    assert counted(query, key, value, table) == 8
    assert counted(*inputs(torch.bfloat16), table) == counted(*inputs(torch.bfloat16), table.bfloat16()) - 1 == 9


def test_results_do_not_depend_on_whether_a_plan_is_there():
    first, second = inputs(), tuple(x + 1 for x in inputs())
    fresh = forward(*second)
    plans._plans.clear()
    forward(*first)
    assert all(torch.equal(a, b) for a, b in zip(forward(*second)[:2], fresh[:2], strict=True))


def test_what_changes_the_choice_changes_the_plan(monkeypatch, tmp_path):
    configs = plans.configs
    operands = inputs()
    assert counted(*operands) == 1
    with configs.forced(configs.Config(16, 16, 1, 1)):
        assert counted(*operands) == 2
        tiles = {
            name: getattr(list(plans._plans.values())[-1].steps[0].arguments[-1], name) for name in ("own", "block")
        }
    assert tiles == {"own": 16, "block": 16}
    with configs.assumed_architecture("sm_90"):
        assert counted(*operands) == 3
    monkeypatch.setattr(plans, "full_precision", lambda dtype: False)
    assert counted(*operands) == counted(*operands) == 4
    configs.write(configs.read(), tmp_path / "configs.json")
    assert counted(*operands) == 5


def test_devices_have_plans_of_their_own():
    on = {device: [x.to(device) for x in inputs()] for device in ("cpu", "meta")}
    cpu, meta = (plans._kind(FORWARD, [*x, None], (CODE, False, 0.5, False), False)[0] for x in on.values())
    assert cpu != meta and hash(cpu) != hash(meta)


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(plans, "MOST", 3)
    operands = inputs()
    for step in range(1, 8):
        assert counted(*operands, scale=step / 8) == min(step, 3)
    kept = list(plans._plans)
    forward(*operands, scale=7 / 8)
    assert list(plans._plans) == kept


def test_a_plan_keeps_no_tensor():
    operands = inputs()
    results = forward(*operands, torch.zeros(2, 5, 5), return_lse=True)
    dead = [weakref.ref(x.untyped_storage()) for x in (*operands, *results)]
    del operands, results
    gc.collect()
    assert not any(storage() for storage in dead)


def test_threads(monkeypatch):
    """Each with its own numbers, on one plan, from the first call on. The interpreter itself is for one thread."""

    def launch(plan, tensors, addresses, ready):
        time.sleep(0.001)
        tensors[plan.results[0]].copy_(tensors[0])
        assert addresses[: len(tensors)] == [0 if x is None else x.data_ptr() for x in tensors]

    monkeypatch.setattr(plans.Plan, "_launch", launch)
    numbers = [tuple(x * factor for x in inputs()) for factor in range(1, 33)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda operands: forward(*operands)[0], numbers))
    assert all(torch.equal(output, query) for output, (query, _, _) in zip(found, numbers, strict=True))
    assert len(plans._plans) == 1


def test_memory_that_is_not_aligned(monkeypatch):
    """No allocator gives any, but what was compiled for the other would read beside it."""
    ready = []
    launch = plans.Plan._launch
    monkeypatch.setattr(plans.Plan, "_launch", lambda plan, *rest: (ready.append(rest[-1]), launch(plan, *rest)))
    operands = inputs()
    expected = forward(*operands)[0]
    (plan,) = plans._plans.values()
    plan.made = [
        (lambda shape, strides: torch.empty(10000)[1:].as_strided(shape, strides, 1), shape, strides)
        for _, shape, strides in plan.made
    ]
    assert torch.equal(forward(*operands)[0], expected)
    assert ready == [True, False]


def test_what_is_not_asked_for_is_none():
    query, key, value = inputs()
    output, lse, _ = forward(query, key, value)
    arguments = query, None, query, key, value, None, output, lse, CODE, False, 0.5
    found = plans.run(BACKWARD, (*arguments, [False, True, False, False]))
    assert [x is None for x in found] == [True, False, True, True]
    assert plans.run(BACKWARD, (*arguments, [False] * 4)) == (None,) * 4


def test_inference_mode_and_after():
    """What a plan keeps serves both."""
    operands = inputs()
    with torch.inference_mode():
        inferred = natten_ext.neighborhood_attention(*operands, 3, backend="triton")
    leaves = [x.requires_grad_() for x in operands]
    output = natten_ext.neighborhood_attention(*leaves, 3, backend="triton")
    assert torch.equal(output, inferred)
    assert all(x is not None for x in torch.autograd.grad(output.sum(), leaves))


def test_profilers_hear_of_launches(monkeypatch):
    """Triton's hooks, which a plan's later launches go past where there are none."""
    knobs = plans.triton.knobs.runtime
    assert not plans._hooked()
    for name in ("launch_enter_hook", "launch_exit_hook"):
        heard = list.append
        getattr(knobs, name).add(heard)
        assert plans._hooked()
        getattr(knobs, name).remove(heard)
        for hook, hooked in ((None, False), (heard, True)):
            with monkeypatch.context() as patch:
                patch.setattr(knobs, name, hook)
                assert plans._hooked() == hooked


def test_tf32_is_asked_for_once_and_of_queries_alone(monkeypatch):
    """In float32 the answer is part of a plan; it takes as long as the rest of the look-up."""
    asked = []
    monkeypatch.setattr(plans, "full_precision", lambda dtype: asked.append(dtype) or dtype)
    forward(*inputs(torch.bfloat16), torch.zeros(2, 5, 5))
    forward(*inputs())
    assert asked == [torch.bfloat16, torch.float32]
