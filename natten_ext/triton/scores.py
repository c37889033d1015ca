"""Scores of a tile against a block, in base 2, in either orientation: the part that every pass shares."""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import visible
from .tiles import LOG2E, add_product, row_sums


@triton.jit
def table_entries(table, queries, keys, see, S: tl.constexpr):
    """Entries of a relative position table, for every pair; ``table`` is the address of the offset zero."""
    return tl.load(table + (keys.cell - queries.cell), mask=see, other=0.0).to(S.accumulate)


@triton.jit
def table_centre(table, head, table_rows, table_columns):
    """Address of the offset zero in a head's table."""
    return table + head * (table_rows * table_columns) + table_rows // 2 * table_columns + table_columns // 2


@triton.jit
def logits(products, key_bias, queries, keys, table, scale, lattice, S: tl.constexpr):
    """Scores times log2(e) from the products q.k; minus infinity where a query does not see a key.

    ``key_bias`` is -scale/2 * |k|^2 per key, spread along the queries (used for the score l2 only).
    """
    see = visible(queries, keys, lattice, S)
    scores = products * (scale * LOG2E)
    if S.l2:
        scores += key_bias * LOG2E
    if table is not None:
        scores += table_entries(table, queries, keys, see, S) * LOG2E
    return tl.where(see, scores, float("-inf"))


@triton.jit
def key_bias_of(k, scale, AXIS: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr):
    """What the score l2 adds per key, -scale/2 * |k|^2, along axis 1 - AXIS of the scores."""
    return tl.expand_dims(-scale / 2 * row_sums(k, k, COUNT, S), AXIS)


@triton.jit
def cot_key_bias_of(cot_k, k, scale, AXIS: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr):
    """What the score l2 adds to ``cot_scores`` per key, -scale * gK.K."""
    return tl.expand_dims(-scale * row_sums(cot_k, k, COUNT, S), AXIS)


@triton.jit
def cot_scores(
    cot_first, first, second, cot_second, key_bias, cot_table, queries, keys, scale, lattice,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """X = scale * (cot_first . second + first . cot_second) + gbias: the cotangent of dS (docs/double_backward.md).

    ``first`` is what runs along axis 0, the queries or the keys. Cotangents may be None.
    """
    x = tl.zeros((HEIGHT, WIDTH), S.accumulate)
    if cot_first is not None:
        x = add_product(x, cot_first, second, S)
    if cot_second is not None:
        x = add_product(x, first, cot_second, S)
    x = x * scale
    if key_bias is not None:
        x += key_bias
    if cot_table is not None:
        x += table_entries(cot_table, queries, keys, visible(queries, keys, lattice, S), S)
    return x


@triton.jit
def second_score_gradient(weights, x, d_weights, g, mean, x_mean, offset):
    """Sb, the gradient with respect to the scores in the double backward; ``g`` is dO gV^T or None."""
    inner = x * (d_weights - mean) - x_mean * d_weights - offset
    if g is not None:
        inner += g
    return weights * inner
