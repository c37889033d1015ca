"""The attention problems that every backend has to solve, and how to solve one of them to any order.

A `Case` is a problem: shapes, neighborhood, score, table. `inputs_of` makes its tensors, `forward` runs it through
`natten_ext`, `oracle_forward` through the oracle, and `derivatives` collects the results of the orders asked for.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, product

import torch
from torch import Tensor

import natten_ext
from natten_ext import geometry
from natten_ext.backends.choice import SHARING
from natten_ext.checks import windows_of
from natten_ext.operators import OPERATORS
from tests.operators import oracle

Extents = tuple[int, ...]
Size = int | Extents
Inputs = dict[str, Tensor]

SIZES = ("kernel", "dilation", "stride")
FORWARD, BACKWARD, DOUBLE = 0, 1, 2


@dataclass(frozen=True)
class Case:
    """One attention problem; `tied` names the arguments that are the query tensor itself."""

    name: str
    kind: str  # "full", "grid" or "neighborhood"
    shape: tuple[int, ...]  # of query: (batch, *positions, heads, head_dim)
    keys: int | None = None  # number of keys, for full cross attention
    window: Size = 1
    kernel: Size | tuple[Size, ...] = 1  # a tuple of Size per group is passed on as a list, see `groups`
    dilation: Size | tuple[Size, ...] = 1
    stride: Size | tuple[Size, ...] = 1
    causal: bool | tuple[bool, ...] = False
    groups: tuple[str, ...] = ()  # which of the sizes are lists with one entry per group of heads
    score: str = "dot"
    bias: bool = False
    scale: float | None = None
    shared: int = 1  # heads to a key head
    tied: tuple[str, ...] = ()
    small: bool = False  # small enough for interpreters and emulators

    def __str__(self) -> str:
        parts = [self.name, self.score, "bias" if self.bias else "", "tied" if self.tied else ""]
        return "-".join(filter(None, parts))

    @property
    def heads(self) -> int:
        return self.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.shape[-1]

    @property
    def effective_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def axes(self) -> int:
        """Of the map."""
        return len(self.shape) - 3

    def on_axes(self, size: Size | bool) -> tuple:
        return size if isinstance(size, tuple) else (size,) * self.axes

    def per_head(self, field: str) -> list[Extents]:
        """Kernel, dilation or stride of every head, on every axis."""
        setting = getattr(self, field)
        entries = list(setting) if field in self.groups else [setting]
        return [self.on_axes(entry) for entry in entries for _ in range(self.heads // len(entries))]

    @property
    def neighbors(self) -> tuple[oracle.Neighbors, ...]:
        if self.kind == "full":
            tokens = self.shape[1]
            return (oracle.full_neighbors(tokens, self.keys or tokens),) * self.heads
        extents = self.shape[1:-2]
        if self.kind == "grid":
            return (oracle.grid_neighbors(extents, self.on_axes(self.window)),) * self.heads
        sizes = zip(*map(self.per_head, SIZES), strict=True)
        return tuple(oracle.sliding_neighbors(extents, *of_head, self.on_axes(self.causal)) for of_head in sizes)

    @property
    def lattices(self) -> int:
        """Independent parts of the problem: residue classes and heads of the images (windows may share a part)."""
        classes = [1] * self.heads
        if self.kind == "neighborhood":
            classes = [math.prod(dilation) for dilation in self.per_head("dilation")]
        return self.shape[0] * sum(classes)

    @property
    def table_shape(self) -> tuple[int, ...]:
        extents = [self.on_axes(self.window)] if self.kind == "grid" else self.per_head("kernel")
        return self.heads, *(2 * max(of_axis) - 1 for of_axis in zip(*extents, strict=True))

    def argument(self, field: str) -> object:
        """Kernel, dilation or stride as the public function takes it."""
        setting = getattr(self, field)
        return list(setting) if field in self.groups else setting

    @property
    def code(self) -> list[int]:
        """The neighborhood as the operators take it."""
        if self.kind == "full":
            return geometry.Full().encode()
        if self.kind == "grid":
            return geometry.Grid(self.on_axes(self.window)).encode()
        sizes = map(self.per_head, SIZES)
        return windows_of(self.axes, self.heads, *sizes, self.on_axes(self.causal)).encode()


def random(case: Case, label: str, shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers that depend on the case and the label only, and are the same on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.name}/{label}".encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def inputs_of(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Inputs:
    """The independent inputs of a case: query, and key, value and bias where they are tensors of their own."""
    tokens = (case.keys,) if case.keys else case.shape[1:-2]
    key_shape = (case.shape[0], *tokens, case.heads // case.shared, case.head_dim)
    shapes = {"query": case.shape, "key": key_shape, "value": key_shape}
    if case.bias:
        shapes["bias"] = case.table_shape
    return {n: random(case, n, s, dtype, device) for n, s in shapes.items() if n not in case.tied}


def cotangents_of(case: Case, inputs: Inputs, label: str = "cotangent") -> Inputs:
    """A random tensor like each input: the cotangents of the first derivatives."""
    return {n: random(case, f"{label}/{n}", x.shape, x.dtype, str(x.device)) for n, x in inputs.items()}


def grad_output_of(case: Case, like: Tensor) -> Tensor:
    return random(case, "grad_output", case.shape, like.dtype, str(like.device))


def arguments_of(case: Case, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value and table, from tensors named after the independent inputs."""
    q, k, v = (inputs["query" if name in case.tied else name] for name in ("query", "key", "value"))
    return q, k, v, inputs.get("bias")


def unshared_arguments_of(case: Case, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same with a key head for every head."""
    q, k, v, table = arguments_of(case, inputs)
    k, v = (torch.stack([x[..., head // case.shared, :] for head in range(case.heads)], -2) for x in (k, v))
    return q, k, v, table


def forward(case: Case, inputs: Mapping[str, Tensor], backend: str | None, **options) -> Tensor:
    """Run the case through the public function of `natten_ext`."""
    q, k, v, table = arguments_of(case, inputs)
    options |= {"scale": case.scale, "backend": backend}
    if case.kind == "full":
        if case.score == "l2":
            return natten_ext.l2_attention(q, k, v, **options)
        return natten_ext.attention(q, k, v, **options)
    options |= {"score": case.score, "bias": table}
    if case.kind == "grid":
        return natten_ext.grid_attention(q, k, v, case.window, **options)
    kernel, dilation, stride = map(case.argument, SIZES)
    options |= {"stride": stride, "is_causal": case.causal}
    return natten_ext.neighborhood_attention(q, k, v, kernel, dilation, **options)


def oracle_forward(case: Case, inputs: Mapping[str, Tensor], expanded: bool = False, return_lse: bool = False):
    """Run the case through the oracle, in the precision of its inputs (on the CPU)."""
    q, k, v, table = unshared_arguments_of(case, inputs)
    options = {"score": case.score, "scale": case.effective_scale, "expanded": expanded}
    output, lse = oracle.attend(q, k, v, table, case.neighbors, **options)
    return (output, lse) if return_lse else output


def tangent(case: Case, inputs: Inputs, tangents: Mapping[str, Tensor], backend: str) -> Tensor:
    """The derivative of the output along `tangents` of some inputs, by the operators."""
    operators, choices = OPERATORS[backend], (case.code, case.score == "l2", case.effective_scale)
    given = [tangents.get("query" if name in case.tied else name) for name in ("query", "key", "value", "bias")]
    operands = arguments_of(case, inputs)
    if case.kind not in SHARING[backend]:
        operands = unshared_arguments_of(case, inputs)
        given[1:3] = (None if x is None else x.repeat_interleave(case.shared, -2) for x in given[1:3])
    output, lse, _ = operators.forward(*operands, *choices, False)
    needs = [True, False, False, False, False, False]
    outgoing = torch.zeros_like(output), None
    return operators.double_backward(*given, *outgoing, *operands, output, lse, *choices, needs)[0]


def derivatives(
    function: Callable[[Inputs], Tensor],
    inputs: Inputs,
    grad_output: Tensor,
    cotangents: Mapping[str, Tensor] | None = None,
    order: int = DOUBLE,
) -> Inputs:
    """All results of `function` up to `order`: `output`, `d_<input>`, and `dd_<input>` with `dd_grad_output`.

    The second order is the gradient of `sum over inputs of <cotangent, first derivative>`; inputs without a cotangent
    take no part in that sum. A derivative that autograd does not reach counts as zero.
    """
    leaves = {name: tensor.detach().requires_grad_(order >= BACKWARD) for name, tensor in inputs.items()}
    grad_output = grad_output.detach().requires_grad_(order >= DOUBLE)
    output = function(leaves)
    results = {"output": output}
    if order >= BACKWARD:
        create_graph = order >= DOUBLE
        first = torch.autograd.grad(output, list(leaves.values()), grad_output, create_graph=create_graph)
        results |= {f"d_{name}": grad for name, grad in zip(leaves, first, strict=True)}
    if order >= DOUBLE:
        chosen = {results[f"d_{name}"]: cotangent for name, cotangent in (cotangents or {}).items()}
        second = torch.autograd.grad(
            list(chosen), [*leaves.values(), grad_output], list(chosen.values()), materialize_grads=True
        )
        results |= {f"dd_{name}": grad for name, grad in zip([*leaves, "grad_output"], second, strict=True)}
    return {name: result.detach() for name, result in results.items()}


def oracle_derivatives(
    case: Case,
    inputs: Inputs,
    grad_output: Tensor,
    cotangents: Mapping[str, Tensor] | None = None,
    order: int = DOUBLE,
    dtype: torch.dtype = torch.float64,
    expanded: bool | None = None,
) -> Inputs:
    """`derivatives` of the oracle on the CPU, from inputs of any precision.

    In float64 it is the truth; in a lower precision it is the same computation in plain PyTorch (with the score "l2"
    expanded, unless `expanded` says otherwise).
    """

    def cast(tensors: Mapping[str, Tensor]) -> Inputs:
        return {name: tensor.detach().cpu().to(dtype) for name, tensor in tensors.items()}

    arguments = cast(inputs), grad_output.detach().cpu().to(dtype), cast(cotangents or {})
    expanded = dtype != torch.float64 if expanded is None else expanded
    return derivatives(lambda leaves: oracle_forward(case, leaves, expanded), *arguments, order=order)


def on(target, tensors: Inputs) -> Inputs:
    """These tensors on a target's device."""
    return {name: tensor.to(target.device) for name, tensor in tensors.items()}


def nonempty_subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    names = list(names)
    return list(chain.from_iterable(combinations(names, size) for size in range(1, len(names) + 1)))


def _full(name: str, shape: tuple[int, ...], **fields) -> Case:
    return Case(f"full-{name}", "full", shape, **fields)


def _grid(name: str, shape: tuple[int, ...], window: Size, **fields) -> Case:
    return Case(f"grid-{name}", "grid", shape, window=window, **fields)


def _na(name: str, shape: tuple[int, ...], kernel, dilation=1, stride=1, **fields) -> Case:
    sizes = dict(zip(SIZES, (kernel, dilation, stride), strict=True))
    groups = tuple(field for field, size in sizes.items() if isinstance(size, list))
    sizes = {field: tuple(size) if isinstance(size, list) else size for field, size in sizes.items()}
    return Case(f"na-{name}", "neighborhood", shape, groups=groups, **sizes, **fields)


FULL = [
    _full("self-9", (2, 9, 2, 8), small=True),
    _full("self-65", (2, 65, 2, 16)),
    _full("self-257", (1, 257, 1, 24)),
    _full("cross-13x29", (2, 13, 3, 8), keys=29, small=True),
    _full("cross-70x5", (1, 70, 2, 7), keys=5),
    _full("one-key", (2, 6, 2, 8), keys=1, small=True),
    _full("one-query", (2, 1, 2, 8), keys=11, small=True),
    _full("one-token", (3, 1, 1, 5), small=True),
    _full("batch-0", (0, 5, 2, 8), small=True),
    _full("scaled", (1, 12, 1, 8), scale=1.7),
    *(_full(f"dim-{d}", (1, 10, 2, d), small=d in (1, 3, 24, 72)) for d in (1, 3, 4, 7, 8, 16, 24, 33, 64, 72, 256)),
]
FULL += [replace(case, score="l2", tied=tied) for case in FULL for tied in ((), ("key",)) if not (tied and case.keys)]
FULL += [replace(FULL[0], tied=("key", "value"), score=score) for score in ("dot", "l2")]

GRID = [
    _grid("8x8-w4", (2, 8, 8, 2, 8), 4),
    _grid("6x10-w3x5", (1, 6, 10, 3, 7), (3, 5), small=True),
    _grid("5x7-map", (2, 5, 7, 2, 16), (5, 7)),
    _grid("12x12-map", (1, 12, 12, 1, 4), 12),
    _grid("4x3-w1", (2, 4, 3, 2, 8), 1, small=True),
    _grid("1x12-w1x4", (1, 1, 12, 1, 3), (1, 4), small=True),
    _grid("6x2-w3x1", (1, 6, 2, 2, 33), (3, 1)),
    _grid("16x16-w8", (1, 16, 16, 1, 24), 8),
    _grid("4x4-dim-256", (1, 4, 4, 1, 256), 2),
    _grid("batch-0", (0, 4, 4, 2, 8), 2, small=True),
    _grid("scaled", (1, 4, 6, 1, 8), 2, scale=0.3),
]

NEIGHBORHOOD = [
    _na("7x9-k3", (2, 7, 9, 2, 8), 3, small=True),
    _na("9x11-k3x5", (1, 9, 11, 2, 4), (3, 5)),
    _na("8x6-k4", (2, 8, 6, 1, 8), 4, small=True),
    _na("9x7-k2x5-d2x1", (1, 9, 7, 2, 7), (2, 5), (2, 1)),
    _na("11x7-k3-d2", (1, 11, 7, 2, 8), 3, 2, small=True),
    _na("10x13-k3-d3x4", (1, 10, 13, 1, 16), 3, (3, 4)),
    _na("13x11-k6-d1", (1, 13, 11, 1, 24), 6),
    _na("12x12-k4-d3", (1, 12, 12, 1, 8), 4, 3),
    _na("6x5-map", (2, 6, 5, 2, 8), (6, 5)),
    _na("5x6-k1", (2, 5, 6, 2, 8), 1, small=True),
    _na("5x6-k1-d3", (1, 5, 6, 1, 3), 1, (2, 3)),
    _na("1x17-k1x5-d1x3", (2, 1, 17, 1, 8), (1, 5), (1, 3), small=True),
    _na("17x1-k7x1-d2x1", (1, 17, 1, 1, 33), (7, 1), (2, 1)),
    _na("9x9-dilations", (1, 9, 9, 4, 8), 3, [1, 3]),
    _na("9x10-kernels", (1, 9, 10, 4, 8), [3, (4, 5)], 2, small=True),
    _na("12x9-both", (1, 12, 9, 4, 7), [5, (2, 3)], [(2, 1), (3, 2)]),
    _na("11x9-per-head", (1, 11, 9, 3, 4), [3, 1, (5, 2)], [2, 4, (1, 3)], small=True),
    _na("11x9-one-group", (1, 11, 9, 2, 4), [3], [2]),
    _na("16x16-hydra-7", (1, 16, 16, 4, 32), 7, [1, 2]),
    _na("7x7-dim-256", (1, 7, 7, 1, 256), 3, 2),
    _na("6x6-dim-1", (2, 6, 6, 3, 1), 3, 2),
    _na("8x8-dim-72", (1, 8, 8, 1, 72), 5),
    _na("batch-0", (0, 6, 6, 2, 8), 3, small=True),
    _na("scaled", (1, 6, 6, 1, 8), 3, 2, scale=2.5),
]

# Three map axes, strides, causal windows. And lines.
GENERAL = [
    _grid("line-12-w4", (2, 12, 2, 8), 4, small=True),
    _grid("4x6x4-w2x3x4", (1, 4, 6, 4, 2, 8), (2, 3, 4), small=True),
    _grid("3x4x5-map", (1, 3, 4, 5, 1, 5), (3, 4, 5)),
    _grid("4x8x4-w4", (1, 4, 8, 4, 1, 8), 4, small=True),
    _na("line-19-k5-d3", (2, 19, 2, 8), 5, 3, small=True),
    _na("line-40-k7", (1, 40, 3, 16), 7),
    _na("line-23-k4-causal", (2, 23, 1, 8), 4, 2, causal=True, small=True),
    _na("line-21-k6-s4", (1, 21, 2, 4), 6, 1, 4, small=True),
    _na("line-37-k9-s4-causal", (1, 37, 2, 16), 9, 1, 4, causal=True),
    _na("3x4x5-k3", (2, 3, 4, 5, 1, 8), 3, small=True),
    _na("3x7x6-k2x3x4", (1, 3, 7, 6, 1, 4), (2, 3, 4), (1, 2, 1), small=True),
    _na("5x6x9-d", (1, 5, 6, 9, 4, 8), [(3, 3, 3), (2, 1, 5)], [(1, 2, 3), (2, 3, 1)]),
    _na("3x3x17-k3-causal", (1, 3, 3, 17, 1, 8), 3, causal=(True, False, False), small=True),
    _na("5x4x6-s", (1, 5, 4, 6, 1, 7), (3, 2, 4), 1, (2, 1, 3), small=True),
    _na("9x10-causal", (2, 9, 10, 2, 8), 3, 2, causal=True, small=True),
    _na("8x21-causal-x", (1, 8, 21, 2, 8), (3, 5), causal=(False, True)),
    _na("10x7-causal-y", (1, 10, 7, 2, 8), (4, 3), causal=(True, False)),
    _na("9x14-k5-s2x3", (1, 9, 14, 2, 8), 5, 1, (2, 3), small=True),
    _na("8x8-blocks", (2, 8, 8, 2, 8), 4, 1, 4, small=True),
    _na("11x13-s-per-head", (1, 11, 13, 2, 8), [3, 5], [2, 1], [(3, 2), 4], causal=(False, True), small=True),
    _na("13x24-k6-s5-causal", (1, 13, 24, 1, 24), 6, 2, 5, causal=True),
    _na("1x1x1-causal", (2, 1, 1, 1, 2, 4), 1, causal=True, small=True),
    _na("3d-batch-0", (0, 3, 4, 4, 2, 8), 2, 1, 2, causal=(True, False, True), small=True),
]

# Heads that share key heads: in pairs, in threes, all of them.
SHARED = [
    _full("shared-11", (2, 11, 6, 8), shared=3, small=True),
    _full("shared-70x301", (1, 70, 4, 16), keys=301, shared=2),
    _full("shared-3x7", (2, 3, 4, 5), keys=7, shared=4, small=True),
    _grid("shared-6x4-w3x2", (2, 6, 4, 4, 8), (3, 2), shared=2, small=True),
    _grid("shared-16x17-map", (1, 16, 17, 3, 7), (16, 17), shared=3),
    _grid("shared-2x4x3-w2", (1, 2, 4, 3, 6, 4), (2, 2, 3), shared=3, small=True),
    _na("shared-9x11-k3", (2, 9, 11, 4, 8), 3, shared=2, small=True),
    _na("shared-7x13-k5-d1x2", (1, 7, 13, 3, 5), 5, (1, 2), shared=3, small=True),
    _na("shared-6x6-k4", (2, 6, 6, 4, 8), 4, shared=4, small=True),
    _na("shared-10x11-dilations", (1, 10, 11, 8, 4), 3, [1, 3], shared=4, small=True),
    _na("shared-66x7-k7", (1, 66, 7, 3, 8), 7, shared=3),
    _na("shared-line-29-causal", (2, 29, 4, 8), 6, 2, 3, causal=True, shared=4, small=True),
    _na("shared-3x5x9-k3", (1, 3, 5, 9, 4, 8), 3, (1, 1, 2), shared=2, small=True),
    _na("shared-batch-0", (0, 6, 6, 4, 8), 3, shared=2, small=True),
]

# So many heads, batch elements and residue classes that the CPU kernels interleave them in vectors, of up to 16 lanes.
INTERLEAVED = [
    _na("12x7-k3-batch-10", (10, 12, 7, 7, 5), 3),
    _na("11x14-d2x3-batch-4", (4, 11, 14, 6, 8), (4, 3), (2, 3)),
    _na("3x6x9-s1x2x3-batch-8", (8, 3, 6, 9, 4, 4), (2, 3, 4), (1, 1, 2), (1, 2, 3)),
    _na("4x5-k3-batch-133", (133, 4, 5, 2, 3), 3),  # the last vector, not full, has the same first head as others
    _na("10x9-causal-y-batch-11", (11, 10, 9, 6, 9), (5, 6), causal=(True, False)),
]

CASES = FULL + [
    replace(case, score=score, bias=bias)
    for case in GRID + NEIGHBORHOOD + INTERLEAVED
    for score in ("dot", "l2")
    for bias in (False, True)
]
# With one of the four in turn for interpreters and emulators, for the sake of time.
CASES += [
    replace(case, score=score, bias=bias, small=case.small and turn == number % 4)
    for number, case in enumerate(GENERAL + [case for case in SHARED if case.kind != "full"])
    for turn, (score, bias) in enumerate(product(("dot", "l2"), (False, True)))
]
CASES += [replace(case, score=score) for case in SHARED if case.kind == "full" for score in ("dot", "l2")]
CASES += [
    replace(case, score=score, bias=True, tied=tied)
    for case in (GRID[1], NEIGHBORHOOD[0], NEIGHBORHOOD[16])
    for score, tied in (("l2", ("key",)), ("dot", ("key", "value")))
]

# One problem of every neighborhood, score and table, small enough for numerical derivatives.
TINY = [
    replace(case, score=score, bias=bias and case.kind != "full")
    for case in (
        _full("tiny", (1, 5, 2, 3), small=True),
        _full("tiny-cross", (1, 4, 1, 2), keys=6, small=True),
        _grid("tiny", (1, 4, 3, 2, 2), (2, 3), small=True),
        _na("tiny", (1, 4, 5, 2, 2), (3, 2), (1, 2), small=True),
        _na("tiny-per-head", (1, 4, 3, 2, 2), [3, 2], [1, (2, 1)], small=True),
        _na("tiny-shared", (1, 3, 4, 4, 2), (2, 3), shared=2, small=True),
    )
    for score in ("dot", "l2")
    for bias in (False, True)
    if not (bias and case.kind == "full")
]


def find(name: str, **fields) -> Case:
    """The case of this name, with some fields replaced."""
    case = next(case for case in CASES + TINY if case.name == name)
    return replace(case, **fields)


ONE_OF_EACH = [
    find("full-self-9"),
    find("grid-6x10-w3x5", score="l2", bias=True),
    find("na-7x9-k3", bias=True),
    find("na-11x9-per-head", score="l2", bias=True),
    find("na-shared-9x11-k3", bias=True),
]
"""For tests of what does not depend on sizes: each neighborhood, both scores, with a table and without, shared keys."""


def magnitude(tensors: Iterable[Tensor]) -> float:
    """Largest absolute element of some tensors; 0 when there is none."""
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


def ulp(size: float, dtype: torch.dtype) -> float:
    """Unit in the last place of numbers of this size."""
    return 2.0 ** math.floor(math.log2(size)) * torch.finfo(dtype).eps if size > 0 else 0.0
