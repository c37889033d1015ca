"""Layers of GAT: positions, attention with normed queries and keys, gated MLP, noise of the levels of an image.

Sequences are `(B, N, dim)`; tokens of a square map stand row by row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.common import rng
from natten_ext import attention, attention_weights

EPS = 1e-6
"""Added to mean squares in norms."""


def frequencies(count: int) -> Tensor:
    """`count` frequencies from 1 down towards 1/10000, of sines and of rotations alike."""
    return 10_000.0 ** -(torch.arange(count) / count)


def sincos_positions(side: int, dim: int) -> Tensor:
    """`(side * side, dim)`: half of the channels tell the column and half the row, by sines and then cosines.

    Source: "Attention Is All You Need", arXiv 1706.03762, section 3.5, on two axes as in MAE, arXiv 2111.06377.
    """
    angles = torch.arange(side)[:, None] * frequencies(dim // 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def rotary_angles(side: int, head_dim: int) -> Tensor:
    """`(side * side, head_dim / 2)`: the angle by which each pair of channels turns, half by the row, half by the
    column.

    Source: rotary position embedding, RoFormer, arXiv 2104.09864, on two axes as in EVA-02, arXiv 2303.11331.
    """
    axis = torch.arange(side)[:, None] * frequencies(head_dim // 4)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns neighbouring channels of `x` `(B, N, heads, head_dim)` by `angles` `(N, head_dim / 2)`."""
    cosine, sine = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1).flatten(-2)


class RotaryAttention(nn.Module):
    """Self-attention whose queries and keys are normed (RMS, learned gains) and then turned by their positions.

    The last `side * side` tokens are a map; those before them (a class token) are not turned.
    """

    angles: Tensor

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm = nn.RMSNorm(dim // heads, eps=EPS)
        self.key_norm = nn.RMSNorm(dim // heads, eps=EPS)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("angles", rotary_angles(side, dim // heads), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*self._project(x)).flatten(-2))

    def attention_weights(self, x: Tensor, positions: Tensor | Sequence[int]) -> Tensor:
        """Where the tokens at `positions` look when the module is given `x`: `natten_ext.attention_weights`."""
        query, key, _ = self._project(x)
        return attention_weights(query, key, positions)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self._place(self.query_norm, query), self._place(self.key_norm, key), value

    def _place(self, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        normed = norm(x.to(norm.weight.dtype)).to(x.dtype)  # under autocast in full precision
        others, tokens = normed.split([x.shape[1] - len(self.angles), len(self.angles)], dim=1)
        return torch.cat([others, rotate(tokens, self.angles)], dim=1)


class GatedMLP(nn.Module):
    """SwiGLU: Linear to twice the hidden width, `silu(first half) * second half`, Linear.

    Source: "GLU Variants Improve Transformer", Shazeer 2020, arXiv 2002.05202; the hidden width is two thirds of
    `dim * ratio`, which makes as many parameters as an MLP without gate has.
    """

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        hidden = 2 * dim * ratio // 3
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def noise_shares(levels: int, information: float) -> list[float]:
    """The share of noise in each level of an image, from `1.01 - information` in the first to 0.01 in the last: what is
    left of the image grows geometrically.
    """
    exponents = [1 - level / (levels - 1) for level in range(levels)] if levels > 1 else [0.0]
    return [1.01 - information**exponent for exponent in exponents]


def perturb(levels: Sequence[Tensor], information: float) -> list[Tensor]:
    """Each level of an image with its share t of noise, `(1 - t) x + t N(0, 1)`.

    From the last level to the first it is one diffusion: each has the noise of the level after it, and more. Source:
    multi-level noise-perturbed image guidance (MNG) of GAT, arXiv 2509.24935, and its published code.
    """
    results: list[Tensor] = []
    noise, before = torch.zeros_like(levels[-1]), 0.0
    for image, share in reversed(list(zip(levels, noise_shares(len(levels), information), strict=True))):
        kept = (1 - share) / (1 - before)
        fresh = rng.randn(*image.shape, device=image.device, dtype=image.dtype)
        noise = kept * noise + (share**2 - (kept * before) ** 2) ** 0.5 * fresh
        results.append((1 - share) * image + noise)
        before = share
    return results[::-1]


def init_linears(model: nn.Module) -> None:
    """Xavier-uniform weights and zero biases of every Linear; a convolution over patches is one."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
