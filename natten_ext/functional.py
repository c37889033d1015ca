"""The public functions: checks, the choice of a backend, and the call."""

from __future__ import annotations

import math

import torch

from .backends import choice
from .checks import (
    FlagPerAxis,
    SizePerAxis,
    SizePerGroup,
    check_bias,
    check_bool,
    check_score,
    checked_additional,
    checked_maps,
    checked_sequences,
    grid_of,
    neighborhood_of,
    scale_of,
)
from .composition import Call, attend, attend_in_windows, attend_more
from .geometry import AnyNeighborhood, Full, Grid
from .recording import record


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    score: str = "dot",
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query to every key, with first and second derivatives and memory linear in the tokens.

    ``softmax_j(scale * score(q_i, k_j)) v_j`` with ``score`` "dot" (q.k; Vaswani et al., arXiv 1706.03762) or "l2"
    (-|q-k|^2; Kim et al., arXiv 2006.04710).

    Args:
        query: ``(batch, queries, heads, head_dim)``; float32, float64, bfloat16 or float16, any strides.
        key, value: ``(batch, keys, heads, head_dim)``, the same dtype and device; at least one key. They may have fewer
            heads, a divisor of the query's, each of which serves as many adjacent query heads (grouped-query attention,
            arXiv 2305.13245). Values may have another width.
        score: "dot" or "l2".
        scale: factor of the score, positive and at most 8.5e37 (4.4e307 for float64); ``head_dim ** -0.5`` if None.
        backend: a name from ``natten_ext.list_backends()``; None lets ``use_backend`` or the package choose.
        return_lse: whether to return the log-sum-exp of the scores as well.

    Returns:
        ``(batch, queries, heads, width of value)``. With ``return_lse`` a tuple of it and each query's log-sum-exp,
        ``log(sum_j exp(scale * score(q_i, k_j)))``: ``(batch, queries, heads)``, float64 for float64 inputs, otherwise
        float32, and NaN where a score is NaN or infinity, as the output is. It has every derivative that the output
        has. ``natten_ext.merge_attention`` takes both.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message names it.
        RuntimeError: the backend asked for can't run this, or a fused backend is asked for a third derivative or for
            forward mode over forward mode (docs/derivatives.md).
    """
    query, key, value = checked_sequences(query, key, value)
    return run(query, key, value, None, Full(), score, scale, backend, return_lse)


def l2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``attention`` with the score -|q-k|^2: ``softmax_j(-scale * |q_i - k_j|^2) v_j``.

    A layer is Lipschitz with it if query and key are one projection (tied), which its values pass through as well.

    Distances are taken about a vector amid the keys, so it costs nothing that all vectors lie far from zero; clusters
    far from each other do cost digits (docs/kernels.md, known limits).

    Kim et al., "The Lipschitz Constant of Self-Attention", arXiv 2006.04710, section 3.2; ViTGAN's discriminator
    (Lee et al., arXiv 2107.04589). Arguments and errors as ``attention``.
    """
    return attention(query, key, value, score="l2", scale=scale, backend=backend, return_lse=return_lse)


def grid_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_size: SizePerAxis,
    *,
    shift: SizePerAxis = 0,
    bias: torch.Tensor | None = None,
    score: str = "dot",
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention inside non-overlapping windows of a map (TransGAN's grid self-attention, arXiv 2102.07074).

    With the window equal to the map it is full attention with a relative position bias.

    Args:
        query, key, value: ``(batch, *map, heads, head_dim)`` with a map of one axis (width), two (height, width) or
            three (depth, height, width); dtypes, strides, heads and widths as ``attention``.
        window_size: int, or a tuple with one per map axis; at most the map. Windows that do not divide it are cut off
            at its end: the last ones have fewer keys.
        shift: likewise, less than the window: windows begin there and every ``window_size`` from there, those at both
            ends are cut off. Shifted windows as in Swin Transformer (arXiv 2103.14030): what it makes of a rolled map
            and masks, without either.
        bias: relative position table ``(heads, *(2 * window - 1))`` with one axis per map axis, added to the scaled
            score and indexed by key minus query plus ``window - 1``; the query's dtype or float32.
            Minus infinity masks; finite entries, however large, do not overflow.
        score, scale, backend, return_lse: as ``attention``.

    Returns:
        ``(batch, *map, heads, head_dim)``. A NaN or infinity reaches what attends it; in the
        backend `triton` it may also reach others in a tile (docs/triton.md). With ``return_lse`` a tuple of it and the
        log-sum-exp, ``(batch, *map, heads)``, as ``attention``; the table counts among the scores.

    Raises:
        As ``attention``.
    """
    query, key, value = checked_maps(query, key, value)
    neighborhood = grid_of(query.shape[1:-2], window_size, shift)
    check_bias("bias", bias, query, neighborhood)
    return run(query, key, value, bias, neighborhood, score, scale, backend, return_lse)


def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: SizePerGroup,
    dilation: SizePerGroup = 1,
    *,
    stride: SizePerGroup = 1,
    is_causal: FlagPerAxis = False,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    score: str = "dot",
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Sliding-window attention on a map, dilated, with its own kernel and dilation per group of heads.

    NATTEN's neighborhoods (arXiv 2204.07143, 2209.15001, 2504.16922): exactly ``kernel_size`` keys per axis,
    ``dilation`` apart, centred on the query and shifted inward at the borders. Lists make StyleNAT's Hydra-NA
    (arXiv 2211.05770) one launch. docs/neighborhoods.md has the rule as formulas.

    Args:
        query, key, value: ``(batch, *map, heads, head_dim)`` with a map of one axis (width), two (height, width) or
            three (depth, height, width); dtypes, strides, heads and widths as ``attention``.
        kernel_size: int, a tuple with one per map axis, or a list of these with one entry per equal group of heads. A
            list is never a tuple: ``(7, 5)`` is 7 rows and 5 columns for all heads, ``[7, 5]`` 7 x 7 for the first half
            of the heads and 5 x 5 for the second.
        dilation: likewise. ``kernel_size * dilation`` must not exceed the map.
        stride: likewise, at most ``kernel_size``. So many adjacent queries (of a residue class) share the window of
            their middle one; with ``stride`` equal to ``kernel_size`` neighborhoods are blocks.
        is_causal: bool, or a tuple with one per map axis. On a causal axis a query sees the last ``kernel_size`` keys
            up to itself, fewer near the start.
        additional_keys, additional_values: ``(batch, additional tokens, heads, head_dim)``, with heads that divide the
            query's and the widths of key and value: keys that every query attends besides, in the same softmax
            (registers, text). No table entry is added to their scores. A query whose whole neighborhood a table masks
            attends them alone, but has NaN for gradients.
        bias: relative position table ``(heads, *(2 * K - 1))`` with one axis per map axis and K the largest kernel over
            the heads, indexed by (key minus query) / dilation plus ``K - 1``; the query's dtype or float32.
            Minus infinity masks; finite entries, however large, do not overflow.
        score, scale, backend, return_lse: as ``attention``.

    Returns:
        ``(batch, *map, heads, head_dim)``. A NaN or infinity reaches what attends it; in the
        backend `triton` it may also reach others in a tile (docs/triton.md). With ``return_lse`` a tuple of it and the
        log-sum-exp, ``(batch, *map, heads)``, as ``attention``; the table counts among the scores.

    Raises:
        As ``attention``.
    """
    query, key, value = checked_maps(query, key, value)
    extents, heads = query.shape[1:-2], query.shape[-2]
    neighborhood = neighborhood_of(extents, heads, kernel_size, dilation, stride, is_causal)
    check_bias("bias", bias, query, neighborhood)
    additional = checked_additional(query, additional_keys, additional_values)
    return run(query, key, value, bias, neighborhood, score, scale, backend, return_lse, *additional)


def run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    neighborhood: AnyNeighborhood,
    score: str,
    scale: float | None,
    backend: str | None,
    return_lse: bool = False,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The call, once the operands are checked."""
    check_score(score)
    check_bool("return_lse", return_lse)
    scale = scale_of(query, scale)
    widest = max(query.shape[-1], value.shape[-1])
    keys = neighborhood.keys(math.prod(key.shape[1:-2]))
    name = choice.choose(backend, query.device, query.dtype, widest, neighborhood.kind, keys)
    record(name, query, key, bias, neighborhood, score, scale)
    call = Call(name, score, scale, return_lse or additional_keys is not None)
    if isinstance(neighborhood, Grid) and neighborhood.cut(query.shape[1:-2]):
        results = attend_in_windows(call, query, key, value, bias, neighborhood)
    else:
        results = attend(call, query, key, value, bias, neighborhood)
    if additional_keys is not None:
        results = attend_more(call, results, query, additional_keys, additional_values)
    return results if return_lse else results[0]
