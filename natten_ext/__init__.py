"""Fused local attention for PyTorch, with three derivative orders on every backend."""

from . import operators as _operators  # registers them  # noqa: F401
from .backends.choice import BackendStatus, list_backends, use_backend
from .compat.natten_021 import na1d, na2d, na3d
from .functional import attention, grid_attention, l2_attention, neighborhood_attention
from .merging import merge_attention
from .modules import Attention, GridAttention, L2Attention, NeighborhoodAttention
from .recording import AttentionCall, record_calls
from .version import __version__
from .weights import attention_weights

__all__ = [
    "Attention",
    "AttentionCall",
    "BackendStatus",
    "GridAttention",
    "L2Attention",
    "NeighborhoodAttention",
    "__version__",
    "attention",
    "attention_weights",
    "grid_attention",
    "l2_attention",
    "list_backends",
    "merge_attention",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "record_calls",
    "use_backend",
]
