"""Operators called directly, past the checks of the public functions: what does not fit is an exception, never a crash.

A wrong size or device would make a kernel read and write elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import natten_ext
from natten_ext.backends import cuda
from natten_ext.checks import windows_of
from natten_ext.geometry import Full, Grid
from natten_ext.operators import OPERATORS

ORDERS = ["forward", "backward", "double_backward"]
NEIGHBORHOODS = {
    "full": Full(),
    "grid": Grid((2, 3)),
    "neighborhood": windows_of(2, 2, [(3, 2), (2, 3)], [(1, 2), (2, 1)]),
}
REFUSED = (RuntimeError, ValueError, TypeError, NotImplementedError)
HUGE = (2**31, 2**32 + 1, 2**62, 2**63 - 1, -1, -(2**63), 0)


@dataclass
class Call:
    """An operator's tensors by name, and its other arguments."""

    order: str
    backend: str
    tensors: dict[str, Tensor | None]
    choices: dict[str, Any]

    def __call__(self, **changed: Any) -> Any:
        arguments = {**self.tensors, **self.choices, **changed}
        return getattr(OPERATORS[self.backend], self.order)(*arguments.values())


def call_of(order: str, kind: str, backend: str, device: str) -> Call:
    torch.manual_seed(1)
    neighborhood = NEIGHBORHOODS[kind]
    shape = (2, 5, 2, 8) if kind == "full" else (2, 4, 6, 2, 8)
    query, key, value, grad_output = torch.randn(4, *shape, device=device).unbind(0)
    bias = None if kind == "full" else torch.randn(2, *(2 * n - 1 for n in neighborhood.kernel), device=device)
    operands = {"query": query, "key": key, "value": value, "bias": bias}
    choices = {"neighborhood": neighborhood.encode(), "l2": False, "scale": 0.5}
    if order == "forward":
        return Call(order, backend, operands, choices | {"return_lse": False})
    output, lse, _ = OPERATORS[backend].forward(*operands.values(), *choices.values(), False)
    grad_lse = torch.randn_like(lse[0])
    backward = {"grad_output": grad_output, "grad_lse": grad_lse, **operands, "output": output, "lse": lse}
    needs = [True, True, True, bias is not None]
    if order == "backward":
        return Call(order, backend, backward, choices | {"needs": needs})
    cotangents = {f"cot_{name}": None if x is None else torch.randn_like(x) for name, x in operands.items()}
    return Call(order, backend, cotangents | backward, choices | {"needs": [True, True, *needs]})


def misfits(tensor: Tensor) -> dict[str, Tensor]:
    """Tensors that must not be taken in the place of this one."""
    last = tensor.dim() - 1
    return {
        "on meta": tensor.to("meta"),
        "fewer tokens": tensor.narrow(1, 0, tensor.shape[1] - 1),
        "more channels": torch.cat([tensor, tensor], last),
        "one dimension less": tensor[0],
        "one dimension more": tensor[None],
        "no elements": tensor.narrow(last, 0, 0),
        "float64": tensor.double(),
        "float16": tensor.half(),
        "integers": tensor.long(),
        "sparse": tensor.to_sparse(),
    }


@pytest.mark.parametrize("kind", NEIGHBORHOODS)
@pytest.mark.parametrize("order", ORDERS)
def test_one_operand_that_does_not_fit_the_others(target, order, kind):
    call = call_of(order, kind, target.backend, target.device)
    call()
    for name, tensor in call.tensors.items():
        if tensor is None:
            continue
        for what, misfit in misfits(tensor).items():
            if (order, kind, name, what) == ("forward", "full", "query", "fewer tokens"):
                continue  # cross attention
            with pytest.raises(REFUSED):
                call(**{name: misfit})
                pytest.fail(f"{name} {what} was taken")
        if name in ("query", "key", "value", "grad_output", "output", "lse"):
            with pytest.raises(REFUSED, match=f"{name} must be a tensor, got None"):
                call(**{name: None})


@pytest.mark.parametrize("order", ORDERS[1:])  # the forward takes none
def test_lse_must_be_contiguous(target, order):
    call = call_of(order, "neighborhood", target.backend, target.device)
    spread = torch.stack([call.tensors["lse"]] * 2, -1)[..., 0]
    with pytest.raises(REFUSED, match="contiguous"):
        call(lse=spread)


@pytest.mark.parametrize("order", ORDERS)
def test_a_table_where_there_is_none(target, order):
    full = call_of(order, "full", target.backend, target.device)
    with pytest.raises(REFUSED, match="bias"):
        full(bias=torch.zeros(2, 1, 1, device=target.device))
    if order == "double_backward":
        call = call_of(order, "grid", target.backend, target.device)
        with pytest.raises(REFUSED, match="bias"):
            call(bias=None)


@pytest.mark.parametrize("order", ORDERS)
def test_absurd_neighborhood_codes(target, order):
    """Every place of every code, huge, negative and zero; codes of wrong length and kind."""
    for kind, neighborhood in NEIGHBORHOODS.items():
        call = call_of(order, kind, target.backend, target.device)
        code = [*neighborhood.encode()]
        wrong = [[], code[:-1], [*code, 1], [3, *code[1:]], [-1, *code[1:]], [*code, *code[1:], 1]]
        wrong += [[(kind_code + 1) % 3, *code[1:]] for kind_code in code[:1]]
        wrong += [[*code[:i], huge, *code[i + 1 :]] for i in range(1, len(code)) for huge in HUGE]
        # Products that come out small where they overflow.
        wrong += [[2, *[2**62, 4, 1, 0] * 6], [2, *[2**33, 2**31, 1, 0] * 6], [2, *[2**32, 2**32, 1, 0] * 6]]
        for bad in wrong:
            if bad == code:  # windows are not causal, and zero says so
                continue
            with pytest.raises(REFUSED):
                call(neighborhood=bad)
                pytest.fail(f"{bad} was taken")


@pytest.mark.parametrize("order", ORDERS[1:])
def test_needs_has_an_entry_per_gradient(target, order):
    call = call_of(order, "grid", target.backend, target.device)
    count = len(call.choices["needs"])
    for needs in ([], call.choices["needs"][:-1], [*call.choices["needs"], True]):
        with pytest.raises(REFUSED, match=f"needs must have {count} entries, one per gradient, got {len(needs)}"):
            call(needs=needs)


@pytest.mark.parametrize("order", ORDERS)
def test_a_backend_that_is_not_there_says_so(order, monkeypatch):
    call = replace(call_of(order, "grid", "cpu", "cpu"), backend="cuda")
    monkeypatch.setattr(cuda, "_not_loaded", lambda: "it was not built")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this: it was not built"):
        call()


@pytest.mark.parametrize("order", ORDERS)
def test_a_gpu_that_is_full_is_torchs_own_error(order, monkeypatch):
    def full(*arguments):
        raise RuntimeError("natten_ext: cannot allocate a result of shape (2, 5): CUDA out of memory. Tried")

    call = replace(call_of(order, "grid", "cpu", "cpu"), backend="cuda")
    monkeypatch.setattr(cuda, "_not_loaded", lambda: "")
    monkeypatch.setattr(torch.ops.natten_ext_cuda, f"{order}_kernels", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        call()


def test_results_that_do_not_fit():
    """The kernels allocate them; what torch says of that reaches the caller."""
    query = torch.zeros(1, 1, 1, 8).expand(10**12, 1, 1, 8)
    reason = "can't allocate memory" if torch.__version__ >= "2.13" else "most likely out of memory"
    with pytest.raises(RuntimeError, match=rf"a result of shape \(1000000000000, 1, 1, 8\): .*{reason}"):
        natten_ext.attention(query, query, query, backend="cpu")


@pytest.mark.parametrize("shape", [(2, 5, 2, 300), (2, 5, 0, 8), (2, 5, 2, 0), (2, 0, 2, 8)], ids=str)
def test_sizes_without_kernels(target, shape):
    operand = torch.zeros(shape, device=target.device)
    with pytest.raises(REFUSED):
        OPERATORS[target.backend].forward(operand, operand, operand, None, [0], False, 1.0, False)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("axis_keys", (0, 5, 3, 0)),
        ("axis_keys", (-(2**63), 5, 3, -1)),
        ("axis_keys", (5, 5, 3, 1)),
        ("axis_keys", (0, 5, 2**62, 4)),
        ("axis_keys", (0, 5, 3, 1, 4)),
        ("axis_keys", (0, 5, 3, 1, 0)),
        ("class_length", (5, 0, 0)),
        ("class_length", (-(2**63), -1, 0)),
        ("class_length", (5, 2, 2)),
    ],
)
def test_geometry_of_the_extension(name, arguments):
    extension = pytest.importorskip("natten_ext._C")
    with pytest.raises(ValueError, match="must be"):
        getattr(extension, name)(*arguments)


def test_public_functions_keep_working_on_meta_tensors():
    q = torch.empty(2, 5, 2, 8, device="meta")
    assert natten_ext.attention(q, q, q, backend="cpu").is_meta
