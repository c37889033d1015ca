"""What the public functions make of operators: shared key heads, other widths of values, windows that borders cut off,
keys that every query attends besides. To the second derivative, against the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

import natten_ext
from natten_ext import attention, grid_attention, neighborhood_attention
from tests.operators import oracle
from tests.operators.cases import derivatives


@dataclass(frozen=True)
class Composed:
    """A problem with what is composed; `window` makes it a grid, `kernel` a neighborhood, neither full attention."""

    extents: tuple[int, ...]
    heads: int = 2
    key_heads: int = 2
    width: int = 4
    value_width: int = 4
    keys: int | None = None
    window: tuple[int, ...] | None = None
    shift: tuple[int, ...] | None = None
    kernel: tuple[int, ...] | None = None
    causal: bool = False
    additional: int = 0
    bias: bool = False
    score: str = "dot"
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.extents)), f"h{self.heads}over{self.key_heads}"]
        parts += [f"w{self.width}v{self.value_width}", f"window{self.window}shift{self.shift}" if self.window else ""]
        parts += [f"plus{self.additional}" * bool(self.additional), self.score, "bias" * self.bias]
        return "-".join(filter(None, parts)).replace(" ", "")

    def inputs(self, batch: int = 2) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        tokens = (self.keys,) if self.keys else self.extents
        shapes = {
            "query": (batch, *self.extents, self.heads, self.width),
            "key": (batch, *tokens, self.key_heads, self.width),
            "value": (batch, *tokens, self.key_heads, self.value_width),
        }
        if self.additional:
            shapes["additional_keys"] = (batch, self.additional, self.key_heads, self.width)
            shapes["additional_values"] = (batch, self.additional, self.key_heads, self.value_width)
        if self.bias:
            shapes["bias"] = (self.heads, *(2 * size - 1 for size in self.window or self.kernel))
        return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}

    def run(self, inputs: dict[str, torch.Tensor], backend: str, return_lse: bool = False):
        options = {"score": self.score, "backend": backend, "return_lse": return_lse}
        q, k, v = (inputs[name] for name in ("query", "key", "value"))
        if not self.window and not self.kernel:
            return attention(q, k, v, **options)
        options["bias"] = inputs.get("bias")
        if self.window:
            return grid_attention(q, k, v, self.window, shift=self.shift or 0, **options)
        options |= {name: inputs.get(name) for name in ("additional_keys", "additional_values")}
        return neighborhood_attention(q, k, v, self.kernel, is_causal=self.causal, **options)

    def true(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        axes, ones = len(self.extents), (1,) * len(self.extents)
        if self.window:
            neighbors = oracle.grid_neighbors(self.extents, self.window, self.shift)
        elif self.kernel:
            neighbors = oracle.sliding_neighbors(self.extents, self.kernel, ones, ones, (self.causal,) * axes)
        else:
            neighbors = oracle.full_neighbors(self.extents[0], self.keys or self.extents[0])
        q, *others = (inputs.get(n) for n in ("query", "key", "value", "additional_keys", "additional_values"))
        shared = self.heads // self.key_heads
        k, v, *additional = (
            None if x is None else torch.stack([x[..., h // shared, :] for h in range(self.heads)], -2) for x in others
        )
        options = {"score": self.score, "scale": self.width**-0.5}
        if self.additional:
            options["additional"] = tuple(additional)
        return oracle.attend(q, k, v, inputs.get("bias"), (neighbors,) * self.heads, **options)


PROBLEMS = [
    Composed((7,), heads=6, key_heads=2),
    Composed((5,), heads=4, key_heads=1, keys=9, score="l2"),
    Composed((5,), heads=3, key_heads=3, width=3, value_width=7),
    Composed((6,), heads=2, key_heads=1, width=8, value_width=1, score="l2"),
    Composed((5, 6), heads=4, key_heads=2, kernel=(3, 4), bias=True),
    Composed((5, 6), heads=2, key_heads=1, kernel=(3, 3), width=3, value_width=5, score="l2", bias=True),
    Composed((4, 6), heads=4, key_heads=2, window=(2, 3), bias=True, value_width=2),
    Composed((7, 9), window=(3, 4), bias=True),
    Composed((8, 8), window=(4, 4), shift=(2, 1), bias=True),
    Composed((8, 6), window=(4, 3), shift=(1, 0), score="l2", heads=2, key_heads=1),
    Composed((7, 5), window=(4, 3), shift=(2, 2), bias=True, score="l2"),
    Composed((11,), window=(4,), shift=(3,), bias=True),
    Composed((3, 4, 5), window=(2, 3, 2), shift=(1, 2, 0), bias=True),
    Composed((4, 4), window=(4, 4), shift=(3, 3), bias=True),
    Composed((5, 6), kernel=(3, 3), additional=4),
    Composed((5, 6), kernel=(3, 5), additional=1, bias=True, score="l2", heads=4, key_heads=2, value_width=6),
    Composed((9,), kernel=(4,), additional=3, causal=True, width=5, value_width=2),
    Composed((2, 3, 4), kernel=(2, 2, 3), additional=2, bias=True),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("backend", [None, "reference"], ids=["auto", "reference"])
def test_to_the_second_derivative(problem, backend):
    inputs = problem.inputs()
    generator = torch.Generator().manual_seed(1)

    def both(results):
        """The output and the log-sum-exp as one tensor."""
        return torch.cat([results[0], results[1].unsqueeze(-1)], -1)

    expected_output = both(problem.true(inputs))
    grad = torch.randn(expected_output.shape, generator=generator, dtype=torch.float64)
    cotangents = {n: torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in inputs.items()}
    found = derivatives(lambda leaves: both(problem.run(leaves, backend, True)), inputs, grad, cotangents)
    expected = derivatives(lambda leaves: both(problem.true(leaves)), inputs, grad, cotangents)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(problem.run(inputs, backend), problem.true(inputs)[0], rtol=1e-10, atol=1e-11)


def swin(query, key, value, bias, window, shift):
    """Shifted windows as Swin Transformer computes them: the rolled map, in whole windows, with a mask."""
    height, width = query.shape[1:3]
    back = tuple(-s for s in shift)
    regions = torch.zeros(1, height, width, 1, 1)
    count = 0
    for rows in (slice(0, -window), slice(-window, -shift[0]), slice(-shift[0], None)):
        for columns in (slice(0, -window), slice(-window, -shift[1]), slice(-shift[1], None)):
            regions[:, rows, columns], count = count, count + 1

    def parts(x):
        x = x.reshape(x.shape[0], height // window, window, width // window, window, *x.shape[3:])
        return x.transpose(2, 3).flatten(3, 4)  # (batch, rows, columns, tokens, heads, channels)

    q, k, v = (parts(x.roll(back, (1, 2))).transpose(3, 4) for x in (query, key, value))
    region = parts(regions).flatten(3)
    place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    dy, dx = (place[None] - place[:, None] + window - 1).unbind(-1)
    scores = q @ k.mT * query.shape[-1] ** -0.5 + bias[:, dy, dx]
    scores = scores.masked_fill((region.unsqueeze(-1) != region.unsqueeze(-2)).unsqueeze(3), -torch.inf)
    output = (scores.softmax(-1) @ v).transpose(3, 4).unflatten(3, (window, window)).transpose(2, 3)
    return output.reshape(query.shape).roll(shift, (1, 2))


def test_shifted_windows_are_those_of_swin():
    query, key, value = torch.randn(3, 2, 8, 12, 3, 8, dtype=torch.float64).unbind(0)
    bias = torch.randn(3, 7, 7, dtype=torch.float64)
    for shift in ((2, 2), (1, 3)):
        ours = grid_attention(query, key, value, 4, shift=shift, bias=bias)
        torch.testing.assert_close(ours, swin(query, key, value, bias, 4, shift))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_and_autocast(dtype):
    for problem in PROBLEMS:
        inputs = {name: x.to(dtype) for name, x in problem.inputs().items()}
        output, lse = problem.run(inputs, None, True)
        assert (output.dtype, lse.dtype) == (dtype, torch.float32)
        true, _ = problem.true({name: x.double() for name, x in inputs.items()})
        torch.testing.assert_close(
            output.double(), true, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
        )
    wide = {name: x.float() for name, x in PROBLEMS[15].inputs().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PROBLEMS[15].run(wide, None).dtype == torch.bfloat16


def test_batch_of_nothing_and_meta():
    for problem in PROBLEMS:
        inputs = problem.inputs(batch=0)
        output, lse = problem.run(inputs, None, True)
        assert output.shape == (0, *problem.extents, problem.heads, problem.value_width)
        assert lse.shape == output.shape[:-1]
        on_meta = problem.run({name: x.to("meta") for name, x in problem.inputs().items()}, None)
        assert on_meta.shape == (2, *output.shape[1:])


def test_one_record_for_one_call():
    for problem in (PROBLEMS[10], PROBLEMS[14]):
        with natten_ext.record_calls() as calls:
            problem.run(problem.inputs(), None)
        assert len(calls) == 1


def test_vmap_and_compile():
    problem = PROBLEMS[15]
    inputs = problem.inputs()
    stacked = {name: torch.stack([x, 2 * x]) if name != "bias" else x for name, x in inputs.items()}
    dims = {name: None if name == "bias" else 0 for name in inputs}
    found = torch.func.vmap(lambda x: problem.run(x, None), (dims,))(stacked)
    for i in range(2):
        alone = {name: x if name == "bias" else x[i] for name, x in stacked.items()}
        torch.testing.assert_close(found[i], problem.run(alone, None))
    compiled = torch.compile(lambda x: problem.run(x, None), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), problem.run(inputs, None))


@pytest.mark.parametrize("shift", [0, (1, 0)], ids=["", "shifted"])
def test_weights_of_windows_that_are_cut(shift):
    query, key, value = torch.randn(3, 1, 7, 6, 4, 8).unbind(0)
    key, value, bias = key[..., :2, :], value[..., :2, :], torch.randn(4, 5, 7)
    options = {"window_size": (3, 4), "shift": shift, "bias": bias}
    positions = [(y, x) for y in range(7) for x in range(6)]
    weights = natten_ext.attention_weights(query, key, positions, **options).flatten(3)
    output = torch.einsum("bphk,bkhd->bphd", weights, value.repeat_interleave(2, -2).flatten(1, 2))
    torch.testing.assert_close(output.unflatten(1, (7, 6)), grid_attention(query, key, value, **options))
