"""float32 problems whose products torch allows to be computed in TF32."""

from __future__ import annotations

import pytest
import torch

from tests.operators.budget import largest_error
from tests.operators.cases import (
    Case,
    cotangents_of,
    derivatives,
    forward,
    grad_output_of,
    inputs_of,
    magnitude,
    oracle_derivatives,
)
from tests.operators.conftest import Target, targets

CASE = Case("tf32", "full", (2, 9, 2, 8), score="l2", small=True)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To the 11 bits of TF32."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent).float()


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("norm", [10, 100])
@pytest.mark.parametrize("on", [target for target in targets(with_reference=False) if target.backend != "cpu"], ids=str)
def test_distances_of_vectors_far_from_the_origin(on: Target, norm: float):
    """Two clusters on either side of the origin: within one, distances are small and products are not."""
    inputs = inputs_of(CASE, torch.float32)
    sides = torch.tensor([1.0, 1, 1, 1, 0, -1, -1, -1, -1]).view(9, 1, 1) * norm / 8**0.5
    for name in ("query", "key"):
        inputs[name] = rounded(inputs[name] / 4 + sides)
    inputs["key"][:, 4] = 0  # the origin: the median of nine keys
    grad_output = grad_output_of(CASE, inputs["query"])
    cotangents = {name: rounded(x) for name, x in cotangents_of(CASE, inputs).items()}
    unrounded = inputs | {
        n: x + 2.0**-13 * x.abs() * torch.randn_like(x).sign() for n, x in inputs.items() if n != "value"
    }
    there, given = ({n: x.to(on.device) for n, x in tensors.items()} for tensors in (unrounded, cotangents))
    results = derivatives(lambda leaves: forward(CASE, leaves, on.backend), there, grad_output.to(on.device), given)
    for name, true in oracle_derivatives(CASE, inputs, grad_output, cotangents).items():
        assert largest_error(results[name], true) <= 1e-2 * magnitude([true]), name
