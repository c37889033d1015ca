"""Problems of the kinds that NATTEN 0.21 tests its fused attention on, through its names, against dense attention.

NATTEN's tests go through every choice of causal axes, strides from one to the kernel, dilations, kernels as large as
the map, values of another width, shared key heads and additional keys, on one to three axes. These here are drawn by
the same choices, smaller.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from natten_ext.compat import natten_021
from tests.operators.oracle import axis_neighbors


@dataclass(frozen=True)
class Problem:
    extents: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    heads: int
    key_heads: int
    width: int
    value_width: int
    additional: int

    def __str__(self) -> str:
        sizes = (self.extents, self.kernel, self.stride, self.dilation)
        parts = ["x".join(map(str, size)) for size in sizes] + ["".join("nc"[causal] for causal in self.causal)]
        return "-".join([*parts, f"h{self.heads}over{self.key_heads}", f"w{self.width}v{self.value_width}"]) + (
            f"-plus{self.additional}" * bool(self.additional)
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        of_keys = {"key": self.width, "value": self.value_width}
        shapes = {"query": (2, *self.extents, self.heads, self.width)}
        shapes |= {name: (2, *self.extents, self.key_heads, width) for name, width in of_keys.items()}
        if self.additional:
            more = {f"additional_{name}s": width for name, width in of_keys.items()}
            shapes |= {name: (2, self.additional, self.key_heads, width) for name, width in more.items()}
        return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def allowed(self) -> torch.Tensor:
        """Which keys a query sees: bool ``(queries, keys)``."""
        mask = torch.ones(1, 1, dtype=torch.bool)
        for axis in zip(self.extents, self.kernel, self.dilation, self.stride, self.causal, strict=True):
            length = axis[0]
            of_axis = torch.zeros(length, length, dtype=torch.bool)
            for query in range(length):
                of_axis[query, axis_neighbors(query, *axis)] = True
            mask = (mask[:, None, :, None] & of_axis[None, :, None, :]).reshape(2 * [len(mask) * length])
        return mask

    def dense(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and the log-sum-exp, from all scores."""
        query = inputs["query"].flatten(1, -3)
        allowed, keys, values = self.allowed(), inputs["key"].flatten(1, -3), inputs["value"].flatten(1, -3)
        if self.additional:
            keys = torch.cat([keys, inputs["additional_keys"]], 1)
            values = torch.cat([values, inputs["additional_values"]], 1)
            allowed = torch.cat([allowed, torch.ones(len(allowed), self.additional, dtype=torch.bool)], 1)
        keys, values = (x[:, :, torch.arange(self.heads) * self.key_heads // self.heads] for x in (keys, values))
        scores = torch.einsum("bqhc,bkhc->bqhk", query, keys) * self.width**-0.5
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        output = torch.einsum("bqhk,bkhc->bqhc", scores.softmax(-1), values)
        return output.unflatten(1, self.extents), scores.logsumexp(-1).unflatten(1, self.extents)


def problems(count: int, seed: int = 0) -> Iterator[Problem]:
    """So many for each choice of causal axes, on one, two and three axes."""
    draw = random.Random(seed)
    choices = [causal for axes in (1, 2, 3) for causal in itertools.product((False, True), repeat=axes)]
    for causal in [causal for causal in choices for _ in range(count)]:
        largest = (60, 12, 6)[len(causal) - 1]
        extents = tuple(draw.randint(4, largest) for _ in causal)
        kernel = extents if draw.random() < 0.15 else tuple(draw.randint(2, size) for size in extents)
        stride = tuple(draw.choice((1, draw.randint(1, size), size)) for size in kernel)
        dilation = tuple(draw.randint(1, size // k) for size, k in zip(extents, kernel, strict=True))
        heads = draw.choice((1, 1, 2, 3, 4))
        key_heads = draw.choice([count for count in range(1, heads + 1) if heads % count == 0])
        width, value_width = draw.choice((4, 8, 20)), draw.choice((0, 0, 3, 8, 24))
        additional = draw.choice((0, 0, 7))
        yield Problem(
            extents, kernel, stride, dilation, causal, heads, key_heads, width, value_width or width, additional
        )


PROBLEMS = list(problems(12))


def test_the_kinds_are_as_frequent_as_in_natten():
    """Of the 1,245 comparisons of its fused attention, in its own tests."""
    shares = {
        "causal": (918, lambda p: any(p.causal)),
        "stride": (750, lambda p: max(p.stride) > 1),
        "another width of values": (567, lambda p: p.width != p.value_width),
        "three axes": (489, lambda p: len(p.extents) == 3),
        "shared key heads": (150, lambda p: p.heads != p.key_heads),
    }
    for kind, (count, belongs) in shares.items():
        assert sum(map(belongs, PROBLEMS)) / len(PROBLEMS) >= count / 1245, kind


@pytest.mark.samples(interpreted=6)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_problem(any_target, problem):
    """The output, the log-sum-exp and all gradients of both."""
    if any_target.slow and math.prod(problem.extents) * math.prod(problem.dilation) * problem.heads > 300:
        pytest.skip("for native kernels")
    any_target.skip_unless_can(torch.float64, max(problem.width, problem.value_width))
    inputs = {name: x.to(any_target.device).requires_grad_() for name, x in problem.inputs().items()}
    function = getattr(natten_021, f"na{len(problem.extents)}d")
    windows = problem.kernel, problem.stride, problem.dilation, problem.causal
    results = function(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        *windows,
        additional_keys=inputs.get("additional_keys"),
        additional_values=inputs.get("additional_values"),
        backend=any_target.backend,
        return_lse=True,
    )
    expected = problem.dense({name: x.cpu() for name, x in inputs.items()})
    cotangents = [torch.randn_like(x) for x in expected]
    gradients = torch.autograd.grad(results, list(inputs.values()), [x.to(any_target.device) for x in cotangents])
    true = torch.autograd.grad(expected, list(inputs.values()), cotangents)
    for one, other in zip((*results, *gradients), (*expected, *true), strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-10, atol=1e-11)
