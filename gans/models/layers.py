"""Layers shared by the transformer GANs: norms, noise, the transformer block, sizes, initialisation.

Maps are channels-last, `(batch, height, width, channels)`; sequences are `(batch, tokens, channels)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.common import rng
from gans.models.conditioning import ClassesConfig
from natten_ext import Attention, GridAttention, attention

NormName = Literal["layer", "rms"]
LinearInit = Literal["torch", "trunc_normal"]


class ScaleFreeRMSNorm(nn.Module):
    """`y = x / sqrt(mean_c(x^2) + eps)` over the last axis, without learned parameters.

    TransGAN's "modified normalization" (arXiv 2102.07074, section 3), the pixel norm of ProGAN. Any shape;
    the dtype is kept.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def make_norm(name: NormName, dim: int) -> nn.Module:
    """The norm called `name` over a last axis of `dim` channels; ValueError for another name."""
    if name == "layer":
        return nn.LayerNorm(dim)
    if name == "rms":
        return ScaleFreeRMSNorm()
    raise ValueError(f"norm must be 'layer' or 'rms', got {name!r}")


class TokenNoise(nn.Module):
    """Adds one Gaussian number per token to all of its channels, times a learned strength that starts at 0.

    Drawn from `gans.common.rng`, in evaluation too (as the published TransGAN code does).
    """

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + rng.randn(*x.shape[:-1], 1, device=x.device, dtype=x.dtype) * self.strength


class MLP(nn.Module):
    """Linear, erf-GELU, Linear; the hidden width is `dim * ratio`."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * ratio)
        self.fc2 = nn.Linear(dim * ratio, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class CrossAttention(nn.Module):
    """Attention of a map `(B, H, W, dim)` to a sequence `(B, M, context_dim)`, without a table.

    As TransGAN's CelebA-HQ generator has it: projections without bias (unless `qkv_bias`), output projection with.
    """

    def __init__(self, dim: int, heads: int, context_dim: int, *, qkv_bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.value = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query = self.query(x.flatten(1, 2))
        parts = (y.unflatten(-1, (self.heads, -1)) for y in (query, self.key(context), self.value(context)))
        return self.proj(attention(*parts).flatten(-2)).view_as(x)


class Block(nn.Module):
    """Pre-norm transformer block: `x + attn(noise(norm1(x)))`, then `x + mlp(norm2(x))`.

    With a `window` it takes maps `(B, H, W, dim)` and attends within windows of that side, with a relative position
    table unless `rel_pos_bias` is False; with `window=None` it takes sequences `(B, N, dim)` and attends over all
    tokens without a table. With a `context_dim` it begins with cross attention to `(B, M, context_dim)`.
    """

    recompute = True  # under gradient checkpointing

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int | None,
        norm: NormName = "layer",
        noise: bool = False,
        mlp_ratio: int = 4,
        qkv_bias: bool = False,
        rel_pos_bias: bool = True,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.cross_attn = None if context_dim is None else CrossAttention(dim, heads, context_dim, qkv_bias=qkv_bias)
        self.norm1 = make_norm(norm, dim)
        self.noise = TokenNoise() if noise else nn.Identity()
        self.attn: nn.Module = (
            Attention(dim, heads, qkv_bias=qkv_bias)
            if window is None
            else GridAttention(dim, heads, window, qkv_bias=qkv_bias, bias=rel_pos_bias)
        )
        self.norm2 = make_norm(norm, dim)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.cross_attn is not None:
            assert context is not None
            x = x + self.cross_attn(x, context)
        x = x + self.attn(self.noise(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


@dataclass(frozen=True)
class PatchTransformerConfig(ClassesConfig):
    """Sizes of a transformer over square patches of an image; the defaults are ViTGAN's for 32 px."""

    image_size: int = 32
    """Side of the images."""
    channels: int = 3
    """Image channels, 1 or 3."""
    patch_size: int = 4
    """Side of the patches, one token each."""
    dim: int = 384
    """Channels of a token."""
    depth: int = 4
    """Transformer blocks."""
    heads: int = 6
    """Attention heads."""
    mlp_ratio: int = 4
    """Hidden width of the MLPs over `dim`."""

    def _check_patches(self, owner: str) -> None:
        """ValueError where sizes do not fit each other."""
        self._check_classes(owner)
        if self.channels not in (1, 3):
            raise ValueError(f"{owner}.channels is {self.channels}; it must be 1 or 3")
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"{owner}.patch_size is {self.patch_size}; it must divide image_size {self.image_size}")
        if self.dim < 1 or self.heads < 1 or self.dim % self.heads:
            raise ValueError(f"{owner}.heads is {self.heads}, which does not divide the {self.dim} channels")
        if self.depth < 1 or self.mlp_ratio < 1:
            raise ValueError(f"{owner}.depth ({self.depth}) and mlp_ratio ({self.mlp_ratio}) must be at least 1")

    @property
    def side(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


def init_weights(model: nn.Module, linear: LinearInit) -> None:
    """Initialise every Linear and Conv2d of `model` in place.

    Linear: "torch" keeps PyTorch's default, "trunc_normal" draws N(0, 0.02^2) and zeroes the bias. Conv2d:
    Xavier uniform, bias as PyTorch draws it.
    """
    if linear not in ("torch", "trunc_normal"):
        raise ValueError(f"linear must be 'torch' or 'trunc_normal', got {linear!r}")
    for module in model.modules():
        if isinstance(module, nn.Linear) and linear == "trunc_normal":
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)


def learned_embedding(*shape: int) -> nn.Parameter:
    """A parameter of the given shape drawn from N(0, 0.02^2): position embeddings and class tokens."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def to_map(x: Tensor) -> Tensor:
    """Images `(B, C, H, W)` to a map `(B, H, W, C)`."""
    return x.permute(0, 2, 3, 1)


def to_image(x: Tensor) -> Tensor:
    """A map `(B, H, W, C)` to images `(B, C, H, W)`."""
    return x.permute(0, 3, 1, 2)


def _anti_alias_taps() -> tuple[float, ...]:
    """The five taps that bicubic enlargement by 4 and averaging of 4 x 4 pixels amount to on each axis."""

    def cubic(distance: float, a: float = -0.75) -> float:  # Keys' kernel with PyTorch's parameter
        t = abs(distance)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    phases = (-3 / 8, -1 / 8, 1 / 8, 3 / 8)
    return tuple(sum(cubic(tap - phase) for phase in phases) / 4 for tap in range(-2, 3))


ANTI_ALIAS_TAPS = _anti_alias_taps()


def anti_alias(x: Tensor) -> Tensor:
    """A slight blur of maps `(B, H, W, C)` with repeated edge pixels: TransGAN's "updown" of its CelebA-HQ generator.

    The published code enlarges by 4, bicubically, and averages 4 x 4 pixels; the result is this filter's, without
    the memory of the enlarged map.
    """
    batch, height, width, channels = x.shape
    taps = x.new_tensor(ANTI_ALIAS_TAPS)
    planes = F.pad(to_image(x), (2, 2, 2, 2), mode="replicate").reshape(batch * channels, 1, height + 4, width + 4)
    planes = F.conv2d(F.conv2d(planes, taps.view(1, 1, 5, 1)), taps.view(1, 1, 1, 5))
    return to_map(planes.view(batch, channels, height, width))
