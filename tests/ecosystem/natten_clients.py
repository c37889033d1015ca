"""Modules that call natten as published models do: written here, after their call patterns.

Each is given the module ``natten`` and, for a second run, functions of the oracle in the place of natten's.
"""

from __future__ import annotations

import torch
from torch import nn


class NatAttention(nn.Module):
    """As in NAT and DiNAT (arXiv 2204.07143, 2209.15001) and their successors: with a table, and small maps padded."""

    def __init__(self, dim, kernel_size, num_heads, qk, av, dilation=None, attn_drop=0.0):
        super().__init__()
        self.qk, self.av = qk, av
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.kernel_size, self.dilation = kernel_size, dilation or 1
        self.qkv = nn.Linear(dim, dim * 3)
        self.rpb = nn.Parameter(torch.randn(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, rows, columns, channels = x.shape
        least = self.kernel_size * self.dilation
        x = nn.functional.pad(x, (0, 0, 0, max(0, least - columns), 0, max(0, least - rows)))
        height, width = x.shape[1:3]
        qkv = self.qkv(x).reshape(batch, height, width, 3, self.num_heads, channels // self.num_heads)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
        attn = self.qk(q * self.scale, k, self.rpb, self.kernel_size, self.dilation)
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = self.av(attn, v, self.kernel_size, self.dilation)
        x = x.permute(0, 2, 3, 1, 4).reshape(batch, height, width, channels)
        return self.proj(x[:, :rows, :columns])


class HydraAttention(nn.Module):
    """As in StyleNAT (arXiv 2211.05770): groups of heads with a kernel and a dilation each, one call for each group."""

    def __init__(self, dim, num_heads, kernel_sizes, dilations, qk, av):
        super().__init__()
        self.qk, self.av = qk, av
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.kernel_sizes, self.dilations = kernel_sizes, dilations
        heads = num_heads // len(kernel_sizes)
        self.qkv = nn.Linear(dim, dim * 3)
        self.rpb = nn.ParameterList(torch.randn(heads, 2 * k - 1, 2 * k - 1) for k in kernel_sizes)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).reshape(batch, height, width, 3, self.num_heads, channels // self.num_heads)
        parts = qkv.permute(3, 0, 4, 1, 2, 5).chunk(len(self.rpb), dim=2)
        outputs = []
        for (q, k, v), rpb, kernel, dilation in zip(parts, self.rpb, self.kernel_sizes, self.dilations, strict=True):
            attn = self.qk(q * self.scale, k, rpb, kernel, dilation).softmax(dim=-1)
            outputs.append(self.av(attn, v, kernel, dilation))
        x = torch.cat(outputs, dim=1).permute(0, 2, 3, 1, 4).reshape(batch, height, width, channels)
        return self.proj(x)


class Block(nn.Module):
    """As blocks of NAT's successors, which find out by themselves how natten's module is constructed."""

    def __init__(self, natten, axes, dim, num_heads, kernel_size, dilation=None):
        super().__init__()
        table = {"rel_pos_bias": True} if hasattr(natten, "context") else {"bias": True}
        attention = getattr(natten, f"NeighborhoodAttention{axes}D")
        self.norm = nn.LayerNorm(dim)
        self.attn = attention(
            dim,
            kernel_size=kernel_size,
            dilation=dilation,
            num_heads=num_heads,
            qkv_bias=True,
            qk_scale=None,
            attn_drop=0.0,
            proj_drop=0.0,
            **table,
        )

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Causal3d(nn.Module):
    """As in video models: causal in time, fused where natten says that this is on."""

    def __init__(self, natten, dim, num_heads, kernel_size):
        super().__init__()
        self.natten, self.num_heads, self.kernel_size = natten, num_heads, kernel_size
        self.qkv = nn.Linear(dim, dim * 3)

    def forward(self, x):
        functional, causal = self.natten.functional, (True, False, False)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.movedim(-3, 0)
        if self.natten.is_fna_enabled():
            out = functional.na3d(q, k, v, kernel_size=self.kernel_size, dilation=1, is_causal=causal)
        else:
            q, k, v = (part.movedim(-2, 1) for part in (q * q.shape[-1] ** -0.5, k, v))
            attn = functional.na3d_qk(q, k, self.kernel_size, 1, is_causal=causal).softmax(-1)
            out = functional.na3d_av(attn, v, self.kernel_size, 1, is_causal=causal).movedim(1, -2)
        return out.flatten(-2)
