"""The declarations of the operators: Python's, and the C++ functions that take their arguments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from natten_ext.operators import OPERATORS
from natten_ext.orders import BACKWARD, DOUBLE_BACKWARD, INPUTS, ORDERS, RESULTS

ROOT = Path(__file__).parents[2]
IN_CPP = {
    "Tensor": "Tensor",
    "std::optional<Tensor>": "Tensor?",
    "std::vector<int64_t>": "int[]",
    "std::vector<bool>": "bool[]",
    "bool": "bool",
    "double": "float",
}


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_cpp_takes_and_gives_what_python_declares(order):
    """Nothing else compares them: the stable ABI hands over untyped words, in order."""
    source = (ROOT / "csrc" / "operators.h").read_text()
    match = re.search(rf"static std::tuple<([^>]*)> {order.name}\(([^)]*),\s*Options\.\.\. options\)", source)
    results, parameters = match.groups()
    pairs = [parameter.rsplit(" ", 1) for parameter in re.split(r",\s+", " ".join(parameters.split()))]
    arguments = ", ".join(f"{IN_CPP[kind]} {name}" for kind, name in pairs)
    assert order.schema().startswith(f"({arguments}) -> (")
    assert results.split(", ") == ["Tensor"] * len(order.results)


@pytest.mark.parametrize("backend", OPERATORS)
def test_every_backend_has_the_same_operators(backend):
    for order in ORDERS:
        schema = getattr(OPERATORS[backend], order.name).default._schema
        assert str(schema) == f"natten_ext_{backend}::{order.name}{order.schema()}"


def test_operands_of_an_order_are_those_of_the_one_before_and_its_cotangents():
    """What autograd hands on by position (``natten_ext.operators``)."""
    forward, backward, double = (list(order.types) for order in ORDERS)
    assert backward == ["grad_output", "grad_lse", *INPUTS, *RESULTS, *forward[len(INPUTS) : -1], "needs"]
    assert double == [f"cot_{result.removeprefix('grad_')}" for result in BACKWARD.results] + backward
    assert DOUBLE_BACKWARD.results == ("grad_grad_output", "grad_grad_lse", *BACKWARD.results)


def test_operators_of_a_backend_that_is_not_there_take_meta_tensors():
    """They are declared whether or not its library is loaded."""
    q = torch.empty(2, 5, 2, 8, device="meta")
    output, lse, natural_lse = OPERATORS["cuda"].forward(q, q, q, None, [0], False, 1.0, True)
    assert (output.shape, lse.shape, natural_lse.shape) == (q.shape, (2, 2, 2, 5), (2, 2, 5))
