"""NATTEN's modules, as each of its generations has them constructed: before 0.17, 0.17, and since 0.20.

All have the parameters ``qkv``, ``proj`` and, where there is a table, ``rpb``, as in NATTEN's checkpoints, and take and
return ``(batch, *map, channels)``. They attend in one fused call; where attention weights are to be dropped out, in
training, by the unfused functions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from ..checks import check_dense, layout_of_map, shape_of, shown, windows_of
from ..modules import cropped, padded
from .arguments import Flags, Size, flags, refuse, sizes
from .fused import fused
from .unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

_UNFUSED = {1: (na1d_qk, na1d_av), 2: (na2d_qk, na2d_av), 3: (na3d_qk, na3d_av)}


class NeighborhoodAttention(nn.Module):
    """What the generations have in common; classes of them set ``axes``."""

    axes: ClassVar[int]
    """Of the map."""
    pads: ClassVar[bool] = False
    """Whether maps smaller than kernel_size * dilation are padded with zeros, instead of refused."""

    def _build(
        self,
        channels: int,
        num_heads: int,
        kernel_size: Size,
        stride: Size,
        dilation: Size | None,
        is_causal: Flags,
        table: bool,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        if channels % num_heads:
            raise ValueError(f"num_heads must divide the channels {shown(channels)}, got {shown(num_heads)}")
        self.num_heads, self.head_dim = num_heads, channels // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.kernel_size = sizes("kernel_size", kernel_size, self.axes)
        self.stride = sizes("stride", stride, self.axes)
        self.dilation = sizes("dilation", 1 if dilation is None else dilation, self.axes)
        self.is_causal = flags("is_causal", is_causal, self.axes)
        windows_of(self.axes, 1, self.kernel_size, self.dilation, self.stride, self.is_causal)
        plain = attn_drop == 0 or self.stride == (1,) * self.axes
        refuse("attn_drop", attn_drop, "dropout of attention weights where there is a stride", allowed=plain)
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        if table:
            self.rpb = nn.Parameter(torch.zeros(num_heads, *(2 * kernel - 1 for kernel in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_dense("input", x)
        if x.dim() != self.axes + 2 or x.shape[-1] != self.qkv.in_features:
            layout = layout_of_map(self.axes, "batch", "channels")
            raise ValueError(f"input must be {layout} with {self.qkv.in_features} channels, got shape {shape_of(x)}")
        least = tuple(kernel * dilation for kernel, dilation in zip(self.kernel_size, self.dilation, strict=True))
        maps = padded(x, least) if self.pads else x
        query, key, value = self.qkv(maps).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        if self.training and self.attn_drop.p > 0:
            output = self._unfused(query, key, value)
        else:
            windows = self.kernel_size, self.stride, self.dilation, self.is_causal
            output = fused(self.axes, query, key, value, *windows, self.rpb, self.scale, None, None)
        return self.proj_drop(self.proj(cropped(output.flatten(-2), x)))

    def _unfused(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (maps.movedim(-2, 1) for maps in (query * self.scale, key, value))
        windows = {"kernel_size": self.kernel_size, "dilation": self.dilation, "is_causal": self.is_causal}
        scores, weighted_sum = _UNFUSED[self.axes]
        weights = self.attn_drop(scores(query, key, **windows, rpb=self.rpb).softmax(-1))
        return weighted_sum(weights, value, **windows).movedim(1, -2)

    def extra_repr(self) -> str:
        names = ("head_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal")
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"{settings}, has_bias={self.rpb is not None}"


class Before017(NeighborhoodAttention):
    """Neighborhood attention as before NATTEN 0.17: with a table unless told otherwise, and small maps padded."""

    pads = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Size,
        dilation: Size | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        kernel_size_d: int | None = None,
        dilation_d: int | None = None,
    ):
        super().__init__()
        kernel_size, dilation = _with_depth(kernel_size, kernel_size_d), _with_depth(dilation or 1, dilation_d)
        self._build(dim, num_heads, kernel_size, 1, dilation, False, bias, qkv_bias, qk_scale, attn_drop, proj_drop)


class Of017(NeighborhoodAttention):
    """Neighborhood attention as NATTEN 0.17 has it.

    ``embed_dim``, ``bias`` and ``stride`` are names of other generations, for code that adapts itself.
    """

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: Size | None = None,
        dilation: Size | None = 1,
        is_causal: Flags = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        embed_dim: int | None = None,
        bias: bool | None = None,
        stride: Size = 1,
    ):
        super().__init__()
        dim = embed_dim if dim is None else dim
        for name, value in (("dim", dim), ("num_heads", num_heads), ("kernel_size", kernel_size)):
            if value is None:
                raise TypeError(f"{name} must be given")
        table = rel_pos_bias if bias is None else bias
        self._build(
            dim, num_heads, kernel_size, stride, dilation, is_causal, table, qkv_bias, qk_scale, attn_drop, proj_drop
        )


class Since020(NeighborhoodAttention):
    """Neighborhood attention as NATTEN 0.21 has it, and with ``rel_pos_bias``, which it dropped."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Size,
        stride: Size = 1,
        dilation: Size | None = 1,
        is_causal: Flags = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rel_pos_bias: bool = False,
    ):
        super().__init__()
        self._build(
            embed_dim,
            num_heads,
            kernel_size,
            stride,
            dilation,
            is_causal,
            rel_pos_bias,
            qkv_bias,
            qk_scale,
            0.0,
            proj_drop,
        )
        self.embed_dim = embed_dim


def _with_depth(size: Size, of_depth: int | None) -> Size:
    """(depth, height, width) where the depth has its own."""
    return size if of_depth is None else (of_depth, size, size)
