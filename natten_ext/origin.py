"""Where the keys of an attention lie, so that scores can be computed about that place rather than about zero."""

from __future__ import annotations

import torch

# Beyond this the square of a float32 overflows, and there is nothing to win.
_LARGEST = 1e18


def origin_of(key: torch.Tensor) -> torch.Tensor:
    """A vector amid the keys of each batch and head, to subtract from queries and keys before l2 scores.

    -|q-k|^2 is computed as 2 q.k - |k|^2 (- |q|^2, which softmax removes), which cancels where all vectors lie far from
    zero. A vector subtracted from every query and key of a batch and head changes no distance, and no derivative. It
    is the median, per channel, of nine keys spread over the tokens: where a few of them lie far from the rest, or hold
    NaN or infinity, the rest lose nothing.

    Args:
        key: ``(batch, tokens, heads, head_dim)`` or ``(batch, height, width, heads, head_dim)``, at least one token.

    Returns:
        ``(batch, 1, heads, head_dim)`` or ``(batch, 1, 1, heads, head_dim)``, the key's dtype, detached; finite.
    """
    tokens = key.detach().flatten(1, -3)
    step = -(-tokens.shape[1] // 9)
    sample = tokens[:, step // 2 :: step] if step > 1 else tokens
    middle = sample.nanmedian(1, keepdim=True).values
    middle = torch.where(middle.abs() < _LARGEST, middle, 0)
    return middle.unsqueeze(1) if key.dim() == 5 else middle
