"""Scores of a tile against a block, in base 2, in either orientation: the part that every pass shares.

Weights are exact only if every pass forms the scores as the forward did: the same operations in the same order. So
multiply-adds are spelled out, and what the score l2 adds is read (``distances.py``), not added up again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .places import as_keys, block_place, in_lattice, visible
from .tables import entries_of, entry_pairs_of
from .tiles import LOG2E, add_product, load_column, load_rows, multiply_add, product, row_index


@triton.jit
def logits(q, k, q_term, k_term, queries, keys, table, scale, KEYS: tl.constexpr, S: tl.constexpr):
    """Scores times log2(e); minus infinity where a query does not see a key. Keys run along axis 0 with KEYS.

    ``q_term`` and ``k_term`` are what the score l2 adds to products. What queries and keys that do not exist get along
    axis 0 is any number: their results go nowhere.
    """
    products = _score_products(q, k, q_term, k_term, KEYS, S)
    if table is not None:
        return multiply_add(products, scale * LOG2E, entries_of(table, queries, keys, S), S)
    else:
        scores = products * (scale * LOG2E)
        if not S.exact:
            scores = tl.where(visible(queries, keys, S), scores, float("-inf"))
        elif not (KEYS or S.whole):
            scores = tl.where(keys.valid, scores, float("-inf"))
        return scores


@triton.jit
def _score_products(q, k, q_term, k_term, KEYS: tl.constexpr, S: tl.constexpr):
    products = pair_products(q, k, KEYS, S)
    if S.l2:
        products = products + k_term + q_term
    return products


@triton.jit
def weights_of_queries(scores, row, table, place, S: tl.constexpr):
    """Weights where queries run along axis 1; zero for those that do not exist, if ``logits`` has not seen to it."""
    log_sum = row.log_sum
    if S.exact and table is None and not S.whole:
        log_sum = tl.where(place.valid[None, :], log_sum, float("inf"))
    return tl.exp2(scores - row.base - log_sum)


@triton.jit
def pair_products(of_queries, of_keys, KEYS: tl.constexpr, S: tl.constexpr):
    """Products of rows of the tile and of the block, summed over the channels; keys run along axis 0 with KEYS."""
    OWN: tl.constexpr = S.own
    BLOCK: tl.constexpr = S.block
    if KEYS:
        return product(of_keys, of_queries, OWN, BLOCK, S)
    else:
        return product(of_queries, of_keys, OWN, BLOCK, S)


@triton.jit
def per_query(terms, lattice, place, S: tl.constexpr):
    """Terms of the tile's queries (``distances.py``), as a column; for ``dot`` there are none."""
    if S.l2:
        return load_column(terms.of_queries, lattice, place, S)
    else:
        return tl.zeros((1, 1), S.accumulate)


@triton.jit
def per_key(terms, lattice, place, AXIS: tl.constexpr, S: tl.constexpr):
    """Terms of keys along axis 1 - AXIS. Of one that is not there it is another's: a mask takes more instructions."""
    if S.l2:
        index = row_index(lattice, in_lattice(place, lattice, S), True, S)
        return tl.expand_dims(tl.load(terms.of_keys + lattice.first_key + index), AXIS)
    else:
        return tl.zeros((1, 1), S.accumulate)


@triton.jit
def block_of_keys(
    key, value, score_terms, q, q_term, queries, table, scale, lattice, halo, block, S: tl.constexpr
):  # fmt: skip
    """A block of a walk over the keys that a tile of queries sees: K, V and the ``logits``."""
    there = block_place(halo, block, S)
    k = load_rows(key, lattice, there, True, S)
    v = load_rows(value, lattice, there, True, S)
    k_term = per_key(score_terms, lattice, there, 0, S)
    return k, v, logits(q, k, q_term, k_term, queries, as_keys(there, 0), table, scale, False, S)


@triton.jit
def logits_and_x(
    q, k, q_term, k_term, cot_q, cot_k, q_x_term, k_x_term, queries, keys, table, cot_table, scale,
    KEYS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The ``logits``, and X = scale * (gQ.K + Q.gK) + gbias, the cotangent of dS (docs/double_backward.md).

    Cotangents may be None. ``cot_table`` has both tables.
    """
    x = _x_products(q, cot_q, k, cot_k, q_x_term, k_x_term, KEYS, S)
    if cot_table is None:
        return logits(q, k, q_term, k_term, queries, keys, table, scale, KEYS, S), x * scale
    else:
        products = _score_products(q, k, q_term, k_term, KEYS, S)
        entries, cot_entries = entry_pairs_of(cot_table, queries, keys, S)
        return multiply_add(products, scale * LOG2E, entries, S), multiply_add(x, scale, cot_entries, S)


@triton.jit
def _x_products(q, cot_q, k, cot_k, q_term, k_term, KEYS: tl.constexpr, S: tl.constexpr):
    OWN: tl.constexpr = S.own
    BLOCK: tl.constexpr = S.block
    x = tl.zeros((OWN, BLOCK), S.accumulate)
    if cot_q is not None:
        x = add_product(x, k, cot_q, S) if KEYS else add_product(x, cot_q, k, S)
    if cot_k is not None:
        x = add_product(x, cot_k, q, S) if KEYS else add_product(x, q, cot_k, S)
    if S.l2:
        x = x + k_term + q_term
    return x


@triton.jit
def second_score_gradient(weights, y, c, g, t):
    """Sb = P * (Y * C + G - t), of the names in docs/double_backward.md; G may be None."""
    inner = y * c
    if g is not None:
        inner += g
    return weights * (inner - t)
