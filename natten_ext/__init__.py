"""Fused local attention for PyTorch, with three derivative orders on every backend."""

from . import ops as _ops  # registers the operators  # noqa: F401
from .dispatch import BackendStatus, backends, use_backend
from .functional import attention, grid_attention, l2_attention, neighborhood_attention
from .modules import Attention, GridAttention, L2Attention, NeighborhoodAttention

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "BackendStatus",
    "GridAttention",
    "L2Attention",
    "NeighborhoodAttention",
    "attention",
    "backends",
    "grid_attention",
    "l2_attention",
    "neighborhood_attention",
    "use_backend",
]
