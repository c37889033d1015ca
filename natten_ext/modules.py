"""``nn.Module``s around the functions: query-key-value projection, relative position table, output projection."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import nn

from . import functional
from .backends import choice
from .checks import (
    FlagPerAxis,
    SizePerAxis,
    SizePerGroup,
    check_bool,
    check_dense,
    check_scale,
    check_score,
    layout_of_map,
    shape_of,
    shown,
    windows_of,
    windows_of_grid,
)
from .geometry import MAP_AXES, Extents
from .weights import attention_weights


class _AttentionModule(nn.Module):
    """Projections and table that the four modules share. Channels are the last dimension of the input."""

    _layout: str
    """Of the input."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        projections: int,
        table_kernel: Extents | None,
        score: str,
        scale: float | None,
        qkv_bias: bool,
        proj_bias: bool,
        proj_drop: float,
        backend: str | None,
    ):
        super().__init__()
        check_score(score)
        check_scale(scale, torch.float64)  # the tensors' own dtype is known at the call
        if backend is not None:
            choice.check_name(backend)
        _check_heads(embed_dim, num_heads)
        for name, flag in (("qkv_bias", qkv_bias), ("proj_bias", proj_bias)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {shown(flag)}")
        if isinstance(proj_drop, bool) or not isinstance(proj_drop, int | float):
            raise TypeError(f"proj_drop must be a float, got {shown(proj_drop)}")
        if not 0 <= proj_drop <= 1:  # nor NaN
            raise ValueError(f"proj_drop must be a probability from 0 to 1, got {shown(proj_drop)}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.score = score
        self.scale = scale
        self.backend = backend
        self.projections = projections
        self.qkv = nn.Linear(embed_dim, projections * embed_dim, bias=qkv_bias)
        if table_kernel is None:
            self.register_parameter("rel_pos_bias", None)
        else:
            self.rel_pos_bias = nn.Parameter(torch.zeros(num_heads, *(2 * extent - 1 for extent in table_kernel)))
            nn.init.trunc_normal_(self.rel_pos_bias, std=0.02)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def _prepared(self, x: torch.Tensor) -> torch.Tensor:
        """The input as it is projected."""
        return x

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views ``(..., heads, head_dim)`` of one packed projection of the input: nothing is copied."""
        check_dense("input", x)
        if x.dim() != self._layout.count(",") + 1 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"input must be {self._layout} with {self.embed_dim} channels, got shape {shape_of(x)}")
        x = self._prepared(x)
        packed = self.qkv(x).unflatten(-1, (self.projections, self.num_heads, self.head_dim))
        return packed.unbind(-3)

    def _merge(self, output: torch.Tensor) -> torch.Tensor:
        return self.proj_drop(self.proj(output.flatten(-2)))

    def _neighborhood(self) -> dict[str, Any]:
        """The arguments that choose the neighborhood, as the functions take them."""
        return {}

    def attention_weights(
        self, x: torch.Tensor, positions: torch.Tensor | Sequence[int] | Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """Where the queries at ``positions`` look when the module is given ``x``: ``natten_ext.attention_weights``."""
        query, *others = self._project(x)
        key = query if self.projections == 2 else others[0]
        options = {"bias": self.rel_pos_bias, "score": self.score, "scale": self.scale}
        return attention_weights(query, key, positions, **self._neighborhood(), **options)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, score={self.score!r}, backend={self.backend!r}"


def _check_heads(embed_dim: int, num_heads: int) -> None:
    for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {shown(value)}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if embed_dim % num_heads:
        raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")


def _map_layout(map_axes: int) -> str:
    """Of the input of a module on maps."""
    if not isinstance(map_axes, int) or isinstance(map_axes, bool):
        raise TypeError(f"map_axes must be an int, got {shown(map_axes)}")
    if not 1 <= map_axes <= MAP_AXES:
        raise ValueError(f"map_axes must be from 1 to {MAP_AXES}, got {shown(map_axes)}")
    return layout_of_map(map_axes, "batch", "channels")


def padded(x: torch.Tensor, least: Extents) -> torch.Tensor:
    """``(batch, *map, channels)`` with zeros at the ends of the axes that are shorter than ``least``."""
    check_dense("input", x)
    padding = [0, 0]
    for extent, wanted in zip(reversed(x.shape[1:-1]), reversed(least), strict=False):
        padding += [0, max(wanted - extent, 0)]
    return nn.functional.pad(x, padding) if any(padding) else x


def cropped(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What ``padded`` added taken away: the output on the map of ``x``, ``(batch, *map, channels)``."""
    return output[(slice(None), *map(slice, x.shape[1:-1]))]


def _table_kernel(bias: bool, kernel: Extents) -> Extents | None:
    """The kernel that sizes the table, if there is to be one."""
    if not isinstance(bias, bool):
        raise TypeError(f"bias must be True or False (the module makes the table), got {shown(bias)}")
    return kernel if bias else None


class Attention(_AttentionModule):
    """Self-attention of ``(batch, tokens, embed_dim)``; see ``natten_ext.attention``.

    Args:
        embed_dim, num_heads: channels and heads; the heads divide the channels.
        score, scale, backend: as ``natten_ext.attention``.
        qkv_bias, proj_bias: whether the two projections have a bias.
        proj_drop: probability of dropout after the output projection.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names it.
    """

    _layout = "(batch, tokens, channels)"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        score: str = "dot",
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__(
            embed_dim,
            num_heads,
            projections=3,
            table_kernel=None,
            score=score,
            scale=scale,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            proj_drop=proj_drop,
            backend=backend,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self._project(x)
        output = functional.attention(query, key, value, score=self.score, scale=self.scale, backend=self.backend)
        return self._merge(output)


class L2Attention(_AttentionModule):
    """Self-attention with L2-distance scores and one projection for query and key (tied), as Kim et al. require.

    Arguments as ``Attention``, without ``score``. ``qkv`` projects to (query = key, value).
    """

    _layout = "(batch, tokens, channels)"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__(
            embed_dim,
            num_heads,
            projections=2,
            table_kernel=None,
            score="l2",
            scale=scale,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            proj_drop=proj_drop,
            backend=backend,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, value = self._project(x)
        output = functional.l2_attention(query, query, value, scale=self.scale, backend=self.backend)
        return self._merge(output)


class GridAttention(_AttentionModule):
    """Self-attention inside the windows of ``(batch, *map, embed_dim)``; see ``natten_ext.grid_attention``.

    Args:
        window_size, shift: as ``natten_ext.grid_attention``.
        map_axes: how many axes maps have, one to three.
        bias: whether there is a relative position table, the parameter ``rel_pos_bias``.
        Others as ``Attention``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window_size: SizePerAxis,
        *,
        shift: SizePerAxis = 0,
        map_axes: int = 2,
        bias: bool = True,
        score: str = "dot",
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str | None = None,
    ):
        layout = _map_layout(map_axes)
        grid = windows_of_grid(map_axes, window_size, shift)
        super().__init__(
            embed_dim,
            num_heads,
            projections=3,
            table_kernel=_table_kernel(bias, grid.kernel),
            score=score,
            scale=scale,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            proj_drop=proj_drop,
            backend=backend,
        )
        self._layout, self.map_axes = layout, map_axes
        self.window_size, self.shift = grid.window, grid.shift

    def _neighborhood(self) -> dict[str, Any]:
        return {"window_size": self.window_size, "shift": self.shift}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self._project(x)
        output = functional.grid_attention(
            query,
            key,
            value,
            **self._neighborhood(),
            bias=self.rel_pos_bias,
            score=self.score,
            scale=self.scale,
            backend=self.backend,
        )
        return self._merge(output)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, map_axes={self.map_axes}, window_size={self.window_size}, shift={self.shift}"


class NeighborhoodAttention(_AttentionModule):
    """Neighborhood self-attention of ``(batch, *map, embed_dim)``; see ``natten_ext.neighborhood_attention``.

    Args:
        kernel_size, dilation, stride, is_causal: as ``natten_ext.neighborhood_attention``; lists give one entry per
            equal group of heads, and only a tuple is a (height, width).
        map_axes: how many axes maps have, one to three.
        pad_small: maps smaller than kernel_size * dilation are an error, or, with True, get zeros at the ends of their
            axes, before the projections, as in DiNAT's layers (arXiv 2209.15001). Queries attend these places too; the
            output has the map's own.
        bias: whether there is a relative position table, the parameter ``rel_pos_bias``.
        Others as ``Attention``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: SizePerGroup,
        dilation: SizePerGroup = 1,
        *,
        stride: SizePerGroup = 1,
        is_causal: FlagPerAxis = False,
        map_axes: int = 2,
        pad_small: bool = False,
        bias: bool = True,
        score: str = "dot",
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str | None = None,
    ):
        _check_heads(embed_dim, num_heads)
        layout = _map_layout(map_axes)
        neighborhood = windows_of(map_axes, num_heads, kernel_size, dilation, stride, is_causal)
        check_bool("pad_small", pad_small)
        super().__init__(
            embed_dim,
            num_heads,
            projections=3,
            table_kernel=_table_kernel(bias, neighborhood.kernel),
            score=score,
            scale=scale,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            proj_drop=proj_drop,
            backend=backend,
        )
        self._layout, self.map_axes = layout, map_axes
        # The caller may go on to change its lists.
        self.kernel_size, self.dilation, self.stride = copy(kernel_size), copy(dilation), copy(stride)
        self.is_causal = is_causal
        axes = zip(*neighborhood.windows, strict=True)
        self._least = tuple(max(window.kernel * window.dilation for window in of_axis) for of_axis in axes)
        self.pad_small = pad_small

    def _neighborhood(self) -> dict[str, Any]:
        names = ("kernel_size", "dilation", "stride", "is_causal")
        return {name: getattr(self, name) for name in names}

    def _prepared(self, x: torch.Tensor) -> torch.Tensor:
        return padded(x, self._least) if self.pad_small else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self._project(x)
        output = functional.neighborhood_attention(
            query,
            key,
            value,
            **self._neighborhood(),
            bias=self.rel_pos_bias,
            score=self.score,
            scale=self.scale,
            backend=self.backend,
        )
        return self._merge(cropped(output, x) if self.pad_small else output)

    def extra_repr(self) -> str:
        neighborhood = ", ".join(f"{name}={value}" for name, value in self._neighborhood().items())
        padding = ", pad_small=True" if self.pad_small else ""
        return f"{super().extra_repr()}, map_axes={self.map_axes}, {neighborhood}{padding}"
