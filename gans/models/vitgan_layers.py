"""Layers of ViTGAN: attention, MLP, self-modulated norm, positions, and the generator's two output heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.models.equalized import EqualizedLinear
from gans.models.layers import to_image
from gans.models.styles import leaky
from natten_ext import attention, attention_weights

MakeLinear = Callable[..., EqualizedLinear]
ScoreName = Literal["l2", "dot"]
ValuesName = Literal["plain", "projected"]


class ViTAttention(nn.Module):
    """Self-attention of sequences `(B, N, dim)` with dot-product or L2-distance scores.

    "l2": `softmax(-|q_i - k_j|^2 / sqrt(head_dim)) v_j`. `tied` makes query and key one projection (and one
    tensor), without which L2 attention is not Lipschitz. Source: ViTGAN, arXiv 2107.04589, section 3, which
    prints no minus sign and does not say that the distance is squared; both are Kim et al.'s, arXiv 2006.04710.

    `values`: "plain" is `v = x W_v`; "projected" is Kim et al.'s `v_h = x W_q,h W_q,h^T W_v,h / sqrt(head_dim)`,
    which their proof needs: a head does not see where x differs outside the span of its W_q,h, and plain values
    differ there without bound. W_v starts at a size that gives both the same variance.

    `query_gain` scales the queries at initialisation; None is `head_dim ** -0.25` for "l2", where scores are then of
    order 1 for normed inputs, and 1 for "dot". With 1, the nearest other token is so far away that at first each
    attends to itself alone and no gradient says otherwise.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        score: ScoreName = "l2",
        tied: bool = True,
        values: ValuesName = "projected",
        query_gain: float | None = None,
        make_linear: MakeLinear = EqualizedLinear,
    ) -> None:
        super().__init__()
        self.heads, self.score, self.values = heads, score, values
        gain = query_gain
        if gain is None:
            gain = (dim // heads) ** -0.25 if score == "l2" else 1.0
        self.query = make_linear(dim, dim, bias=False, gain=gain)
        self.key = None if tied else make_linear(dim, dim, bias=False, gain=gain)
        value_gain = dim**0.5 / gain**2 if values == "projected" else 1.0
        self.value = make_linear(dim, dim, bias=False, gain=value_gain)
        self.proj = make_linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self._query_and_key(x)
        if self.values == "plain":
            value = self._split(self.value(x))
        else:
            # (heads, head_dim, dim) each: x W_q^T is there already, what remains is W_q W_v^T per head.
            w_query, w_value = (
                linear.effective_weight().unflatten(0, (self.heads, -1)) for linear in (self.query, self.value)
            )
            mix = w_query @ w_value.transpose(1, 2) * query.shape[-1] ** -0.5
            value = torch.einsum("bnhi,hij->bnhj", query, mix.to(query.dtype))
        return self.proj(attention(query, key, value, score=self.score).flatten(-2))

    def attention_weights(self, x: Tensor, positions: Tensor | Sequence[int]) -> Tensor:
        """Where the tokens at `positions` look when the module is given `x`: `natten_ext.attention_weights`."""
        query, key = self._query_and_key(x)
        return attention_weights(query, key, positions, score=self.score)

    def _query_and_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query = self._split(self.query(x))
        return query, query if self.key is None else self._split(self.key(x))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, score={self.score!r}, tied={self.key is None}, values={self.values!r}"


class ViTMLP(nn.Module):
    """Linear, erf-GELU, Linear; the hidden width is `dim * ratio`."""

    def __init__(self, dim: int, ratio: int, *, make_linear: MakeLinear = EqualizedLinear) -> None:
        super().__init__()
        self.fc1 = make_linear(dim, dim * ratio)
        self.fc2 = make_linear(dim * ratio, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def grid_coordinates(size: int, like: Tensor) -> Tensor:
    """`(size * size, 2)`: the rows and columns of a square in [-1, 1], in the device and dtype of `like`."""
    axis = torch.linspace(-1, 1, size, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)


class SinusoidalPositions(nn.Module):
    """`sin(A p + b)` of the coordinates p in [-1, 1] of a square of `size` x `size`: `(size * size, dim)`.

    Learned positions of ViTGAN's patches and Fourier features of the pixels in a patch. A starts from
    U(-3, 3) / sqrt(2), as in CIPS (arXiv 2011.13775), whose features these are.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.linear = nn.Linear(2, dim)
        nn.init.uniform_(self.linear.weight, -3 * 2**-0.5, 3 * 2**-0.5)

    def forward(self) -> Tensor:
        return self.linear(grid_coordinates(self.size, self.linear.weight)).sin()


class SelfModulatedNorm(nn.Module):
    """`gamma(w) * (x - mean) / deviation + beta(w)` over the last axis of `(B, N, dim)`, w `(B, latent)`.

    ViTGAN's SLN, arXiv 2107.04589, section 3: gamma and beta are linear in w; gamma's bias starts at 1, which is
    the authors' later `1 + gamma`.
    """

    def __init__(self, dim: int, latent: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.gamma = EqualizedLinear(latent, dim, bias_init=1.0)
        self.beta = EqualizedLinear(latent, dim)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), eps=self.eps) * self.gamma(w)[:, None] + self.beta(w)[:, None]


class ModulatedConv(nn.Module):
    """A convolution whose weights are scaled per example along the input channels by a style, then normalised.

    Source: weight modulation and demodulation of StyleGAN2, arXiv 1912.04958, equations 1 to 3. Scaling inputs and
    outputs is the same and needs no weights per example. Images `(B, in, H, W)`, styles `(B, style_dim)`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, style_dim: int, *, kernel: int = 1, demodulate: bool = True
    ) -> None:
        super().__init__()
        self.kernel, self.demodulate = kernel, demodulate
        self.style = EqualizedLinear(style_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = (in_channels * kernel**2) ** -0.5

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        style = self.style(style)
        weight = self.weight * self.scale
        x = F.conv2d(x * style[:, :, None, None], weight, padding=self.kernel // 2)
        if self.demodulate:
            power = style.square() @ weight.square().sum((2, 3)).t()
            x = x * torch.rsqrt(power + 1e-8)[:, :, None, None]
        return x + self.bias[:, None, None]


class ImplicitHead(nn.Module):
    """Each patch as a function of its pixels' coordinates: a two-layer perceptron over Fourier features whose weights
    are modulated by the patch's embedding.

    ViTGAN, arXiv 2107.04589, section 3, with CIPS' modulation (arXiv 2011.13775). Embeddings `(B, N, dim)` of
    N = tokens_side^2 patches to images `(B, channels, S, S)`, S = tokens_side * patch_size.
    """

    def __init__(self, dim: int, hidden: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.features = SinusoidalPositions(patch_size, hidden)
        self.conv = ModulatedConv(hidden, hidden, dim)
        self.to_rgb = ModulatedConv(hidden, channels, dim, demodulate=False)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        side, patch = math.isqrt(tokens), self.patch_size
        style = x.flatten(0, 1)
        features = self.features().t().view(1, -1, patch, patch)
        pixels = self.to_rgb(leaky(self.conv(features, style)), style)
        pixels = pixels.view(batch, side, side, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
        return pixels.reshape(batch, -1, side * patch, side * patch)


class ConvHead(nn.Module):
    """Patch embeddings `(B, N, dim)` as a map that modulated 3x3 convolutions double until it is an image.

    The head that ViTGAN's authors recommend in their later code; styles are w `(B, latent)`. Doubling is bilinear
    (theirs: transposed convolution and blur), and there is no noise.
    """

    def __init__(self, dim: int, latent: int, side: int, image_size: int, channels: int) -> None:
        super().__init__()
        widths, size = [dim], side
        while size < image_size:
            size *= 2
            widths.append(min(dim, dim * 64 // size))
        self.convs = nn.ModuleList(
            ModulatedConv(before, after, latent, kernel=3)
            for wide, narrow in pairwise(widths)
            for before, after in ((wide, narrow), (narrow, narrow))
        )
        self.to_rgb = ModulatedConv(widths[-1], channels, latent, demodulate=False)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        image = to_image(x.unflatten(1, (side, side)))
        for i, conv in enumerate(self.convs):
            if i % 2 == 0:
                image = F.interpolate(image, scale_factor=2, mode="bilinear")
            image = leaky(conv(image, w))
        return self.to_rgb(image, w)
