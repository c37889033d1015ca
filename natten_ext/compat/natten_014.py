"""The names of unfused attention before NATTEN 0.17, which StyleNAT, NAT, DiNAT (also in transformers) and others use.

Up to 0.14.4 the functions had no argument for the kernel: it is that of the table or of the scores. From 0.15 on there
were ``na1d_qk_with_bias``, ... as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..checks import check_dense, shape_of
from .modules import Before017
from .unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk


def natten1dqk(query: torch.Tensor, key: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """``na1d_qk``."""
    return na1d_qk(query, key, kernel_size, dilation)


def natten2dqk(query: torch.Tensor, key: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """``na2d_qk``."""
    return na2d_qk(query, key, kernel_size, dilation)


def natten3dqk(
    query: torch.Tensor, key: torch.Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> torch.Tensor:
    """``na3d_qk`` with one kernel and dilation for the depth, and one for height and width."""
    return na3d_qk(query, key, (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation))


def natten1dqkrpb(
    query: torch.Tensor,
    key: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: int | None = None,
    dilation: int | None = None,
) -> torch.Tensor:
    """``na1d_qk`` with a table; ``natten1dqkrpb(query, key, rpb, dilation)`` takes the kernel from the table."""
    return na1d_qk(query, key, *_with_kernel(rpb, kernel_size, dilation), rpb=rpb)


def natten2dqkrpb(
    query: torch.Tensor,
    key: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: int | None = None,
    dilation: int | None = None,
) -> torch.Tensor:
    """``na2d_qk`` with a table; ``natten2dqkrpb(query, key, rpb, dilation)`` takes the kernel from the table."""
    return na2d_qk(query, key, *_with_kernel(rpb, kernel_size, dilation), rpb=rpb)


def natten3dqkrpb(
    query: torch.Tensor,
    key: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> torch.Tensor:
    """``na3d_qk`` with a table, and sizes as ``natten3dqk``."""
    return na3d_qk(query, key, (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation), rpb=rpb)


def na1d_qk_with_bias(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: int,
    dilation: int,
    additional_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """``na1d_qk`` with a table."""
    return na1d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na2d_qk_with_bias(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: int,
    dilation: int,
    additional_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """``na2d_qk`` with a table."""
    return na2d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na3d_qk_with_bias(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """``na3d_qk`` with a table, and sizes as ``natten3dqk``."""
    kernel, step = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_qk(query, key, kernel, step, additional_keys, rpb=bias)


def natten1dav(
    attn: torch.Tensor, value: torch.Tensor, kernel_size: int | None = None, dilation: int | None = None
) -> torch.Tensor:
    """``na1d_av``; ``natten1dav(attn, value, dilation)`` takes the kernel from the scores."""
    return na1d_av(attn, value, *_of_scores(attn, 1, kernel_size, dilation))


def natten2dav(
    attn: torch.Tensor, value: torch.Tensor, kernel_size: int | None = None, dilation: int | None = None
) -> torch.Tensor:
    """``na2d_av``; ``natten2dav(attn, value, dilation)`` takes the kernel from the scores."""
    return na2d_av(attn, value, *_of_scores(attn, 2, kernel_size, dilation))


def natten3dav(
    attn: torch.Tensor, value: torch.Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> torch.Tensor:
    """``na3d_av`` with sizes as ``natten3dqk``."""
    return na3d_av(attn, value, (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation))


def _function(name: str, function: Callable) -> type:
    """A class with the ``apply`` of an autograd function."""
    return type(name, (), {"apply": staticmethod(function), "__doc__": f"``apply`` is ``{function.__name__}``."})


NATTEN1DQKRPBFunction = _function("NATTEN1DQKRPBFunction", natten1dqkrpb)
NATTEN2DQKRPBFunction = _function("NATTEN2DQKRPBFunction", natten2dqkrpb)
NATTEN3DQKRPBFunction = _function("NATTEN3DQKRPBFunction", natten3dqkrpb)
NATTEN1DAVFunction = _function("NATTEN1DAVFunction", natten1dav)
NATTEN2DAVFunction = _function("NATTEN2DAVFunction", natten2dav)
NATTEN3DAVFunction = _function("NATTEN3DAVFunction", natten3dav)


def _with_kernel(rpb: torch.Tensor | None, kernel_size: int | None, dilation: int | None) -> tuple:
    """Kernel and dilation, the first from the table where only one number is given, which is the dilation then."""
    if kernel_size is not None and dilation is not None:
        return kernel_size, dilation
    if rpb is None:
        raise TypeError("kernel_size and dilation must both be given where rpb is None")
    check_dense("rpb", rpb)
    return tuple((extent + 1) // 2 for extent in rpb.shape[1:]), dilation if kernel_size is None else kernel_size


def _of_scores(attn: torch.Tensor, axes: int, kernel_size: int | None, dilation: int | None) -> tuple:
    """As ``_with_kernel``, from the number of scores of a query."""
    if kernel_size is not None and dilation is not None:
        return kernel_size, dilation
    check_dense("attn", attn)
    kernel = math.isqrt(attn.shape[-1]) if axes == 2 else attn.shape[-1]
    if kernel**axes != attn.shape[-1]:
        raise ValueError(
            f"attn must have a square number of scores where kernel_size is not given, got {shape_of(attn)}"
        )
    return kernel, dilation if kernel_size is None else kernel_size


class NeighborhoodAttention1D(Before017):
    __doc__ = Before017.__doc__
    axes = 1


class NeighborhoodAttention2D(Before017):
    __doc__ = Before017.__doc__
    axes = 2


class NeighborhoodAttention3D(Before017):
    __doc__ = Before017.__doc__
    axes = 3
