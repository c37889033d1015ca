"""What the fused backends share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..orders import INTERFACE

Answer = TypeVar("Answer")
Function = TypeVar("Function", bound=Callable[..., Any])

PACKAGE = __package__.partition(".")[0]
"""The name this package is imported by: natten_ext, or another where Hugging Face's ``kernels`` loads a copy that
hub_kernel.py made, which may run beside other versions."""

COMPILED = PACKAGE == "natten_ext"
"""Whether compiled libraries go with it: the names of their operators have natten_ext in them."""

NOT_COMPILED = "only the Triton kernels go with a copy that is loaded by `kernels`; install natten_ext for the others"

REBUILD = "`pip install --no-build-isolation -e .` in the checkout"

MAX_HEAD_DIM = 256
MINIMUM_CAPABILITY = (8, 0)
"""Compute capability that the kernels for GPUs need."""


def full_precision(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are computed in its own precision (float32 may use TF32, as torch's matmul)."""
    return dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"


def cannot_take(dtype: torch.dtype, dtypes: Sequence[torch.dtype], head_dim: int) -> str:
    """Why a backend that has kernels for ``dtypes`` can't take these tensors; empty if it can."""
    if dtype not in dtypes:
        return f"dtype must be one of {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {dtype}"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim must be from 1 to {MAX_HEAD_DIM}, got {head_dim}"
    return ""


def namespace(backend: str) -> str:
    """Of the operators of a backend: natten_ext_cpu, ..."""
    return f"{PACKAGE}_{backend}"


def load(library: str | Path, operators: Any) -> str:
    """Load a compiled library, which registers ``operators``. What is wrong with one that was built from other sources;
    empty if nothing is.

    Raises OSError if it cannot be loaded.
    """
    torch.ops.load_library(library)
    if hasattr(operators, "interface") and operators.interface() == INTERFACE:
        return ""
    return f"{library} was built from other sources than {__file__}, and must be built again: {REBUILD}"


def constant_when_compiled(function: Function) -> Function:
    """A function whose results torch.compile takes for constant.

    As ``torch.compiler.assume_constant_result``, which would import the compiler: two seconds of every program.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def asked_once(question: Callable[..., Answer]) -> Callable[..., Answer]:
    """A function with a cache, whose results torch.compile takes for constant.

    It looks through caches, but can trace neither questions to the driver nor the loading of files.
    """
    cached = functools.cache(question)

    @constant_when_compiled
    @functools.wraps(question)
    def answer(*arguments: object) -> Answer:
        return cached(*arguments)

    return answer


def gpu_of(device: torch.device) -> int:
    """The number of a CUDA device, which is the current one where ``device`` names none."""
    return torch.cuda.current_device() if device.index is None else device.index


def cannot_use_gpu(device: torch.device) -> str:
    """Why the kernels for GPUs can't run on a CUDA device; empty if they can."""
    if reason := _no_gpu():
        return reason
    capability = capability_of(gpu_of(device))
    if capability < MINIMUM_CAPABILITY:
        return "the GPU must have compute capability {}.{} or later, got {}.{}".format(*MINIMUM_CAPABILITY, *capability)
    return ""


@asked_once
def _no_gpu() -> str:
    if torch.version.hip is not None:
        return "device must be an NVIDIA GPU, got an AMD build of torch"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


@asked_once
def capability_of(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
