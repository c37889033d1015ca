"""Scores of a tile against a block, in base 2, in either orientation: the part that every pass shares.

Weights are exact only if every pass forms the scores as the forward did: the same operations in the same order. So
multiply-adds are spelled out, and what the score l2 adds is read (``distances.py``), not added up again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import not_beyond, visible
from .tiles import LOG2E, add_product, add_saturated, key_numbers, product


@triton.jit
def table_entries(table, queries, keys, see, S: tl.constexpr):
    """Entries of a relative position table, for every pair; ``table`` is the address of the offset zero."""
    return tl.load(table + (keys.cell - queries.cell), mask=see, other=0.0).to(S.accumulate)


@triton.jit
def table_centre(table, head, table_rows, table_columns):
    """Address of the offset zero in a head's table."""
    return table + head * (table_rows * table_columns) + table_rows // 2 * table_columns + table_columns // 2


@triton.jit
def logits(q, k, q_term, k_term, queries, keys, table, scale, lattice, KEYS: tl.constexpr, S: tl.constexpr):
    """Scores times log2(e); minus infinity where a query does not see a key. Keys run along axis 0 with KEYS.

    ``q_term`` and ``k_term`` are what the score l2 adds to products. Entries of the table may be as large as numbers
    get: times log2(e) they saturate, and stay finite.
    """
    products = pair_products(q, k, KEYS, S)
    if S.l2:
        products = products + k_term + q_term
    scores = products * (scale * LOG2E)
    see = visible(queries, keys, lattice, S)
    if table is not None:
        scores = add_saturated(scores, table_entries(table, queries, keys, see, S), LOG2E, S)
    return tl.where(see, scores, float("-inf"))


@triton.jit
def pair_products(of_queries, of_keys, KEYS: tl.constexpr, S: tl.constexpr):
    """Products of rows of the tile and of the block, summed over the channels; keys run along axis 0 with KEYS."""
    OWN: tl.constexpr = S.own_h * S.own_w
    BLOCK: tl.constexpr = S.block_h * S.block_w
    if KEYS:
        return product(of_keys, of_queries, OWN, BLOCK, S)
    else:
        return product(of_queries, of_keys, OWN, BLOCK, S)


@triton.jit
def per_query(terms, numbers, valid, AXIS: tl.constexpr, S: tl.constexpr):
    """Terms of queries (``distances.py``) along axis 1 - AXIS of the scores; for ``dot`` there are none."""
    if S.l2:
        return tl.expand_dims(tl.load(terms.of_queries + numbers, mask=valid, other=0.0), AXIS)
    else:
        return tl.zeros((1, 1), S.accumulate)


@triton.jit
def per_key(terms, batch, head, heads, height, width, lattice, place, box, AXIS: tl.constexpr, S: tl.constexpr):
    """Terms of keys likewise. Beyond the box it is that of a key in it: a mask takes more instructions."""
    if S.l2:
        numbers = key_numbers(batch, head, heads, height, width, lattice, not_beyond(place, box), S)
        return tl.expand_dims(tl.load(terms.of_keys + numbers), AXIS)
    else:
        return tl.zeros((1, 1), S.accumulate)


@triton.jit
def cot_scores(
    q, cot_q, k, cot_k, q_term, k_term, cot_table, queries, keys, scale, lattice, KEYS: tl.constexpr, S: tl.constexpr
):
    """X = scale * (gQ.K + Q.gK) + gbias: the cotangent of dS (docs/double_backward.md). Cotangents may be None.

    ``q_term`` and ``k_term`` are what the score l2 adds to products.
    """
    OWN: tl.constexpr = S.own_h * S.own_w
    BLOCK: tl.constexpr = S.block_h * S.block_w
    x = tl.zeros((OWN, BLOCK), S.accumulate)
    if cot_q is not None:
        x = add_product(x, k, cot_q, S) if KEYS else add_product(x, cot_q, k, S)
    if cot_k is not None:
        x = add_product(x, cot_k, q, S) if KEYS else add_product(x, q, cot_k, S)
    if S.l2:
        x = x + k_term + q_term
    x = x * scale
    if cot_table is not None:
        x += table_entries(cot_table, queries, keys, visible(queries, keys, lattice, S), S)
    return x


@triton.jit
def second_score_gradient(weights, x, d_weights, g, offset):
    """Sb, the gradient with respect to the scores in the double backward, from X - r and dP - D; ``g`` may be None."""
    inner = x * d_weights
    if g is not None:
        inner += g
    return weights * (inner - offset)
