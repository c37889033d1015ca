"""The ``matmul`` backend: full and grid attention as matrix products of torch, a part of the problem at a time.

The formulas of docs/double_backward.md, with scores in memory only for the part that is worked on, on any device. Where
the kernels' own products are slow, which is float32 on GPUs, the vendor's library beats them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..geometry import Full, Grid, decode
from ..orders import BACKWARD, FORWARD, INPUTS, Order, accumulation_dtype
from .origin import about_origin
from .reference import without_autocast
from .support import cannot_take, full_precision

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = (Full.kind, Grid.kind)

PART = 1 << 22
"""Scores, or numbers of queries, that are worked on at a time: six matrices of as many scores are in memory at once."""

_LOG2_E = math.log2(math.e)


def cannot_run(_device: torch.device, dtype: torch.dtype, _head_dim: int) -> str:
    """Why this backend can't run a problem; empty if it can."""
    return cannot_take(dtype, DTYPES, head_dim=1)  # any is as good


def run(order: Order, arguments: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """The results of an order, None where one is not asked for."""
    if arguments[order.l2]:
        arguments = about_origin(order, arguments, tf32=not full_precision(arguments[order.query].dtype))
    operands = order.operands(*arguments)
    with torch.no_grad(), without_autocast(operands.query.device.type):
        return _Call(order, operands).results()


class _Call:
    """An order on operands: what it reads and writes, part by part.

    Tables are spread to numbers of each pair, ``(key heads, rows, keys)``, before the first part, and their gradient's
    are added up after the last.
    """

    def __init__(self, order: Order, operands: Any) -> None:
        self.order, self.operands = order, operands
        query, key = operands.query, operands.key
        neighborhood = decode(operands.neighborhood, query.dim() - 3)
        if neighborhood.kind not in KINDS:
            raise ValueError(f"neighborhood must be one of {KINDS}, got {neighborhood.kind}")
        self.wide = accumulation_dtype(query.dtype)
        self.shared = query.shape[-2] // key.shape[-2]  # heads to a key head
        full = isinstance(neighborhood, Full)
        self.window = (max(query.shape[1], 1),) if full else neighborhood.window
        self.key_window = tuple(key.shape[1:-2]) if full else neighborhood.window
        self.asked = dict(zip(order.results, order.asked(operands), strict=True))
        tensors = {name: x for name, x in operands._asdict().items() if isinstance(x, Tensor)}
        self.new = {name: self._new(name) for name, asked in self.asked.items() if asked}
        # With the dimensions of parts first.
        self.given = {name: self._windows(name, x) for name, x in tensors.items() if not name.endswith("bias")}
        self.written = {name: self._windows(name, x) for name, x in self.new.items() if not name.endswith("bias")}
        self.pairs = {name: self._of_pairs(x) for name, x in tensors.items() if name.endswith("bias")}
        if "grad_bias" in self.new:
            rows, keys = self.shared * math.prod(self.window), math.prod(self.key_window)
            self.pairs["grad_bias"] = query.new_zeros((key.shape[-2], rows, keys), dtype=self.wide)

    def results(self) -> tuple[Tensor | None, ...]:
        compute = {FORWARD: _forward, BACKWARD: _backward}.get(self.order, _double_backward)
        for part in self._parts():
            compute(part)
        if "grad_bias" in self.new:
            sums = self.pairs["grad_bias"].unflatten(1, (self.shared, -1)).flatten(0, 1)
            self.new["grad_bias"].copy_(_over_offsets(sums, self.window))
        return tuple(self.new.get(name) for name in self.order.results)

    def _new(self, name: str) -> Tensor:
        query = self.operands.query
        batch, *tokens, heads, _ = query.shape
        if name.endswith("lse"):
            parts = (2,) if name == "lse" else ()
            return query.new_zeros((*parts, batch, heads, *tokens), dtype=self.wide)
        like = query if name in ("output", "grad_grad_output") else getattr(self.operands, name.removeprefix("grad_"))
        return like.new_zeros(like.shape)

    def _windows(self, name: str, x: Tensor) -> Tensor:
        """A view ``(batch, *windows, key heads, heads of one, *positions, channels)``."""
        if name.endswith("lse"):  # its two parts, or none, as channels
            x = (x.movedim(0, -1) if name == "lse" else x.unsqueeze(-1)).movedim(1, -2)
        of_keys = name.endswith(("key", "value"))
        window, shared = (self.key_window, 1) if of_keys else (self.window, self.shared)
        axes = len(window)
        for axis in reversed(range(axes)):
            x = x.unflatten(1 + axis, (x.shape[1 + axis] // window[axis], window[axis]))
        x = x.unflatten(-2, (x.shape[-2] // shared, shared))
        heads = 1 + 2 * axes
        return x.permute(0, *range(1, heads, 2), heads, heads + 1, *range(2, heads, 2), heads + 2)

    def _of_pairs(self, table: Tensor) -> Tensor:
        table = table.to(self.wide).flatten(1)
        most = torch.finfo(self.wide).max / 4  # sums with scores stay finite, in base 2 too
        table = torch.where(table.isfinite(), table.clamp(-most, most), table)
        places = _table_places(self.window, table.device)
        return table[:, places - places[:, None] + places[-1]].unflatten(0, (-1, self.shared)).flatten(1, 2)

    def _parts(self) -> Iterator[_Part]:
        query = self.given["query"]
        leading = query.shape[: -2 - len(self.window)]
        rows, keys = self.shared * math.prod(self.window), math.prod(self.key_window)
        # Where there are more channels than keys, rows are what takes memory.
        for where in _slices(leading, max(1, PART // (rows * max(keys, query.shape[-1])))):
            yield _Part(self, where, rows, keys)


def _slices(sizes: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Cuts an index space of these sizes into boxes of at most ``most``, or of one."""
    if not sizes:
        yield ()
        return
    rest = math.prod(sizes[1:])
    step = max(1, most // max(rest, 1))
    for first in range(0, sizes[0], step):
        for others in _slices(sizes[1:], most):
            yield slice(first, min(first + step, sizes[0])), *others


@dataclass
class _Part:
    """A box of windows and key heads: tensors ``(windows, key heads, rows, channels)`` in the dtype of the computation.

    Rows are the queries of all heads of a key head.
    """

    call: _Call
    where: tuple[slice, ...]
    rows: int
    keys: int

    def read(self, name: str) -> Tensor | None:
        x = self.call.given.get(name)
        return None if x is None else self._matrices(x[self.where]).to(self.call.wide)

    def table(self, name: str, rows: slice) -> Tensor | None:
        """Entries of a table for a range of rows, ``(key heads, rows, keys)``."""
        pairs = self.call.pairs.get(name)
        return None if pairs is None else pairs[self.where[-1], rows]

    def write(self, name: str, result: Tensor) -> None:
        to = self.call.written[name][self.where]
        to.copy_(result.reshape(to.shape))

    def add_to_table(self, sums: Tensor, rows: slice) -> None:
        self.call.pairs["grad_bias"][self.where[-1], rows] += sums.sum(0)

    def asked(self, name: str) -> bool:
        return self.call.asked[name]

    def blocks(self) -> Iterator[slice]:
        """Of rows, for which scores are in memory."""
        step = max(1, PART // self.keys)
        for first in range(0, self.rows, step):
            yield slice(first, min(first + step, self.rows))

    def _matrices(self, x: Tensor) -> Tensor:
        heads = len(self.where) - 1
        return x.reshape(math.prod(x.shape[:heads]), x.shape[heads], math.prod(x.shape[heads + 1 : -1]), x.shape[-1])


def _table_places(window: Sequence[int], device: torch.device) -> Tensor:
    """Of each position of a window a number, such that key's less query's is the distance in a flattened table."""
    places = torch.zeros(1, dtype=torch.int64, device=device)
    for size in window:
        places = (places[:, None] * (2 * size - 1) + torch.arange(size, device=device)).flatten()
    return places


def _over_offsets(sums: Tensor, window: Sequence[int]) -> Tensor:
    """``(heads, queries, keys)`` of a window to the sums of all pairs with equal offsets, a table."""
    x = sums.unflatten(2, window).unflatten(1, window)
    for axis, size in enumerate(window):
        # Each row of queries, the last first, begins one place further: then equal offsets lie below each other.
        x = x.movedim((1, 1 + len(window) - axis), (-2, -1)).flip(-2)
        x = torch.nn.functional.pad(x, (0, size)).flatten(-2)[..., :-size].unflatten(-1, (size, 2 * size - 1)).sum(-2)
    return x


# ---------------------------------------------------------------------------------------------- scores


class _Vectors:
    """Queries and keys of a part as vectors whose products are the scores, and how they move along cotangents.

    Those of dot are (s q) . k. Of l2, -s|q-k|^2 = (2s q, -s|q|^2, -s) . (k, 1, |k|^2).
    """

    def __init__(self, part: _Part) -> None:
        self.s, self.l2 = part.call.operands.scale, part.call.operands.l2
        self.raw_query, self.raw_key = query, key = part.read("query"), part.read("key")
        self.cot_query, self.cot_key = part.read("cot_query"), part.read("cot_key")
        self.query, self.key = self.s * query, key
        if self.l2:
            norm, one = -self.s * _dot(query, query), torch.ones_like(key[..., :1])
            self.query = torch.cat([2 * self.query, norm, torch.full_like(norm, -self.s)], -1)
            self.key = torch.cat([key, one, _dot(key, key)], -1)
        self.moved_query = None if self.cot_query is None else self._move_query(self.cot_query)
        self.moved_key = None if self.cot_key is None else self._move_key(self.cot_key)

    def _move_query(self, by: Tensor) -> Tensor:
        if not self.l2:
            return self.s * by
        norm = -2 * self.s * _dot(self.raw_query, by)
        return torch.cat([2 * self.s * by, norm, torch.zeros_like(norm)], -1)

    def _move_key(self, by: Tensor) -> Tensor:
        if not self.l2:
            return by
        norm = 2 * _dot(self.raw_key, by)
        return torch.cat([by, torch.zeros_like(norm), norm], -1)

    def gradient_of_query(self, gradient: Tensor) -> Tensor:
        """From that of its vectors."""
        if not self.l2:
            return self.s * gradient
        return 2 * self.s * (gradient[..., :-2] - self.raw_query * gradient[..., -2:-1])

    def gradient_of_key(self, gradient: Tensor) -> Tensor:
        return gradient[..., :-2] + 2 * self.raw_key * gradient[..., -1:] if self.l2 else gradient

    def scores(self, rows: slice, table: Tensor | None) -> Tensor:
        """S, in base-2 logarithms."""
        scores = (_LOG2_E * self.query[:, :, rows]) @ self.key.mT
        return scores if table is None else scores.add_(table, alpha=_LOG2_E)

    def weights(self, rows: slice, table: Tensor | None, lse: Tensor) -> Tensor:
        """P."""
        base, log_sum = lse[:, :, rows].split(1, -1)
        return self.scores(rows, table).sub_(base).sub_(log_sum).exp2_()

    def moved_scores(self, rows: slice, table: Tensor | None) -> Tensor | None:
        """X, how scores move along the cotangents; None without any."""
        pairs = [(self.query, self.moved_key), (self.moved_query, self.key)]
        pairs = [(query[:, :, rows], key) for query, key in pairs if query is not None and key is not None]
        if not pairs:
            return None if table is None else table.repeat(len(self.query), 1, 1, 1)
        queries, keys = (torch.cat(vectors, -1) for vectors in zip(*pairs, strict=True))
        moved = queries @ keys.mT
        return moved if table is None else moved.add_(table)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _centred(x: Tensor, weights: Tensor) -> Tensor:
    """Less each row's mean. D is rowsum(dO * O) too, but of an output that is rounded to its dtype."""
    return x.sub_(_dot(weights, x))


# ---------------------------------------------------------------------------------------------- orders


class _Sums:
    """The gradients of a part's inputs, block by block."""

    def __init__(self, part: _Part, vectors: _Vectors) -> None:
        self.part, self.vectors = part, vectors
        self.of_rows: dict[str, list[Tensor]] = defaultdict(list)
        self.of_keys: dict[str, Tensor] = {}

    def _add(self, name: str, term: Tensor) -> None:
        self.of_keys[name] = self.of_keys[name].add_(term) if name in self.of_keys else term

    def add_values(self, weights: Tensor, grad_output: Tensor) -> None:
        if self.part.asked("grad_value"):
            self._add("value", weights.mT @ grad_output)

    def add_scores(self, gradient: Tensor, rows: slice) -> None:
        """By the gradient of scores."""
        if self.part.asked("grad_query"):
            self.of_rows["query"].append(gradient @ self.vectors.key)
        if self.part.asked("grad_key"):
            self._add("key", gradient.mT @ self.vectors.query[:, :, rows])
        if self.part.asked("grad_bias"):
            self.part.add_to_table(gradient, rows)

    def add_moved(self, gradient: Tensor, rows: slice) -> None:
        """By dS: scores are products, and of l2 squares, so that what multiplies dS moves along the cotangents too."""
        part, vectors = self.part, self.vectors
        if part.asked("grad_query"):
            if vectors.moved_key is not None:
                self.of_rows["query"][-1].add_(gradient @ vectors.moved_key)
            if vectors.l2 and vectors.cot_query is not None:
                self.of_rows["sum"].append(gradient.sum(-1, keepdim=True))
        if part.asked("grad_key"):
            if vectors.moved_query is not None:
                self._add("key", gradient.mT @ vectors.moved_query[:, :, rows])
            if vectors.l2 and vectors.cot_key is not None:
                self._add("sum", gradient.sum(-2).unsqueeze(-1))

    def write(self) -> None:
        part, vectors = self.part, self.vectors
        if "query" in self.of_rows:
            gradient = vectors.gradient_of_query(torch.cat(self.of_rows["query"], 2))
            if "sum" in self.of_rows:
                gradient.addcmul_(vectors.cot_query, torch.cat(self.of_rows["sum"], 2), value=-2 * vectors.s)
            part.write("grad_query", gradient)
        if "key" in self.of_keys:
            gradient = vectors.gradient_of_key(self.of_keys["key"])
            if "sum" in self.of_keys:
                gradient.addcmul_(vectors.cot_key, self.of_keys["sum"], value=-2 * vectors.s)
            part.write("grad_key", gradient)
        if "value" in self.of_keys:
            part.write("grad_value", self.of_keys["value"])


def _forward(part: _Part) -> None:
    vectors, value = _Vectors(part), part.read("value")
    outputs, lses = [], []
    for rows in part.blocks():
        scores = vectors.scores(rows, part.table("bias", rows))
        base = scores.amax(-1, keepdim=True)
        weights = scores.sub_(base).exp2_()
        total = weights.sum(-1, keepdim=True)
        outputs.append((weights @ value).div_(total))
        lses.append(torch.cat([base, total.log2_()], -1))
    lse = torch.cat(lses, 2)
    part.write("output", torch.cat(outputs, 2))
    part.write("lse", lse)
    if part.asked("natural_lse"):
        base = lse[..., :1]
        part.write("natural_lse", torch.where(base == -math.inf, base, lse.sum(-1, keepdim=True) / _LOG2_E))


def _backward(part: _Part) -> None:
    vectors, value, lse = _Vectors(part), part.read("value"), part.read("lse")
    grad_output, y = part.read("grad_output"), part.read("grad_lse")
    of_scores = any(part.asked(f"grad_{name}") for name in ("query", "key", "bias"))
    sums = _Sums(part, vectors)
    for rows in part.blocks():
        outgoing = grad_output[:, :, rows]
        p = vectors.weights(rows, part.table("bias", rows), lse)
        sums.add_values(p, outgoing)
        if of_scores:
            c = _centred(outgoing @ value.mT, p)
            if y is not None:
                c += y[:, :, rows]
            sums.add_scores(c.mul_(p), rows)
    sums.write()


def _double_backward(part: _Part) -> None:
    vectors, value, lse = _Vectors(part), part.read("value"), part.read("lse")
    grad_output, y, cot_value = part.read("grad_output"), part.read("grad_lse"), part.read("cot_value")
    second = any(part.asked(f"grad_{name}") for name in INPUTS)
    sums = _Sums(part, vectors)
    moved_output, moved_lse = torch.zeros_like(grad_output), torch.zeros_like(grad_output[..., :1])
    for rows in part.blocks():
        outgoing, moved = grad_output[:, :, rows], moved_output[:, :, rows]
        p = vectors.weights(rows, part.table("bias", rows), lse)
        x = vectors.moved_scores(rows, part.table("cot_bias", rows))
        py = None
        if cot_value is not None:
            moved += p @ cot_value
        t = _dot(outgoing, moved) if second else None
        if x is not None:
            moved_lse[:, :, rows] = _dot(p, x)
            py = x.sub_(moved_lse[:, :, rows]).mul_(p)
            moved += py @ value
        if not second:
            continue
        c = _centred(outgoing @ value.mT, p)
        if py is not None:
            sums.add_values(py, outgoing)
            t += _dot(py, c)
        if y is not None:
            c += y[:, :, rows]
        gradient = p * -t if cot_value is None else (outgoing @ cot_value.mT).sub_(t).mul_(p)
        sums.add_scores(gradient if py is None else gradient.addcmul_(py, c), rows)
        if py is not None:
            sums.add_moved(c.mul_(p), rows)
    if part.asked("grad_grad_output"):
        part.write("grad_grad_output", moved_output)
    if part.asked("grad_grad_lse"):
        part.write("grad_grad_lse", moved_lse)
    sums.write()
