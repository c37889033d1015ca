"""Every candidate's results against natten_ext's reference backend in float64, before anything is timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .candidates import ours
from .precision import PRECISIONS
from .problem import STEPS, Inputs
from .shapes import Shape

# Work of the float64 reference (pairs x channels) for which all heads are checked; beyond it the first and the last.
ALL_HEADS = {"cpu": 1 << 28, "cuda": 1 << 34}
# Elements of the reference's largest tensor that one chunk of the batch may have.
CHUNK = {"cpu": 1 << 25, "cuda": 1 << 29}

# Largest error of a result relative to the reference's root mean square (as "rms") and to its largest entry (as
# "max"), by precision and order. Plain PyTorch stays below a third of these; they tell wrong from right, not good from
# better: tests/operators holds the error budgets.
_LIMITS: dict[str, dict[str, float]] = {
    "float64": {"forward": 1e-12, "backward": 1e-11, "double": 1e-10, "tangent": 1e-11},
    "float32": {"forward": 1e-5, "backward": 3e-5, "double": 2e-4, "tangent": 3e-5},
    "tf32": {"forward": 4e-3, "backward": 1e-2, "double": 4e-2, "tangent": 1e-2},  # as many bits as float16
    "float16": {"forward": 4e-3, "backward": 1e-2, "double": 4e-2, "tangent": 1e-2},
    "bfloat16": {"forward": 2e-2, "backward": 4e-2, "double": 1.5e-1, "tangent": 4e-2},
}


@dataclass(frozen=True)
class Expected:
    """Results of one order in float64 for some of the heads (the last-but-one axis, or the first of a table)."""

    order: str
    heads: list[int]
    results: dict[str, torch.Tensor]


def expect(shape: Shape, inputs: Inputs, order: str) -> Expected:
    """Run the reference head by head, in chunks of the batch: attention never mixes either."""
    device = inputs.query.device.type
    pairs = shape.batch * shape.queries * shape.keys_per_query
    heads = list(range(shape.heads))
    if pairs * shape.head_dim * shape.heads > ALL_HEADS[device]:
        heads = sorted({0, shape.heads - 1})
    per_image = shape.queries * shape.keys_per_query * (shape.head_dim if shape.kind == "neighborhood" else 1)
    chunk = max(1, CHUNK[device] // per_image)
    by_head = [_one_head(shape, inputs, order, head, chunk) for head in heads]
    results = {name: torch.cat([r[name] for r in by_head], 0 if _is_table(name) else -2) for name in by_head[0]}
    return Expected(order, heads, results)


def _one_head(shape: Shape, inputs: Inputs, order: str, head: int, chunk: int) -> dict[str, torch.Tensor]:
    single = shape.single_head(head)
    device = inputs.query.device
    results: dict[str, list[torch.Tensor]] = {}
    for first in range(0, shape.batch, chunk):

        def part(x: torch.Tensor, first: int = first) -> torch.Tensor:
            return x[first : first + chunk, ..., head : head + 1, :].detach().double().requires_grad_()

        query = part(inputs.query)
        key = query if inputs.key is inputs.query else part(inputs.key)
        table = None
        if inputs.table is not None:
            table = inputs.table[head : head + 1].detach().double().requires_grad_()
        leaves = Inputs(query, key, part(inputs.value), table, part(inputs.weight))
        attend = ours("reference")(single, device, torch.float64)
        for name, result in STEPS[order](attend, leaves).items():
            results.setdefault(name, []).append(result)
    return {name: sum(parts) if _is_table(name) else torch.cat(parts) for name, parts in results.items()}


def _is_table(name: str) -> bool:
    return name.endswith("_table")


def compare(results: dict[str, torch.Tensor], expected: Expected, precision: str) -> tuple[dict[str, float], str]:
    """Errors by result (root mean square, relative), and what is wrong (empty if nothing).

    ``precision`` is a name in ``benchmarks.precision``.

    A result is wrong where it is missing, has another shape or dtype, is not finite, or is off by more than the limit
    in its root mean square, or by more than 20 times the limit (relative to the largest entry) anywhere.
    """
    errors: dict[str, float] = {}
    wrong: list[str] = []
    dtype, limit = PRECISIONS[precision], _LIMITS[precision][expected.order]
    for name, reference in expected.results.items():
        result = results.get(name)
        if result is None:
            wrong.append(f"{name} is missing")
            continue
        if result.dtype != dtype:
            wrong.append(f"{name} has dtype {result.dtype} instead of {dtype}")
        axis = 0 if _is_table(name) else result.dim() - 2
        if len(expected.heads) < result.shape[axis]:
            result = result.index_select(axis, torch.tensor(expected.heads, device=result.device))
        if result.shape != reference.shape:
            wrong.append(f"{name} has shape {tuple(result.shape)} instead of {tuple(reference.shape)}")
            continue
        difference = result.double() - reference
        # The smallest normal number keeps a reference of zeros from dividing by zero.
        tiny = torch.finfo(torch.float64).tiny
        rms = float(difference.norm() / reference.norm().clamp(min=tiny))
        peak = float(difference.abs().max() / reference.abs().max().clamp(min=tiny))
        errors[name] = rms
        if not (math.isfinite(rms) and rms <= limit and peak <= 20 * limit):
            wrong.append(f"{name} is off by {rms:.1e} (rms), {peak:.1e} (max); limit {limit:.0e}, {20 * limit:.0e}")
    return errors, "; ".join(wrong)
