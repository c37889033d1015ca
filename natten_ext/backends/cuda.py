"""The ``cuda`` backend: hand-written kernels (csrc/cuda) for the tensor cores of sm_80 and later.

The kernels are in a shared object of their own, because only a torch with CUDA has what it links to: in this package,
where an installation from source found nvcc, or in the package natten_ext_cuda, a wheel. Tests load the same kernels
compiled for the host instead, under the emulator of csrc/emulator; the environment variable
``NATTEN_EXT_CUDA_EMULATOR`` is its path.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..orders import ORDERS, Order
from ..version import __version__
from .origin import about_origin
from .support import (
    COMPILED,
    MAX_HEAD_DIM,
    NOT_COMPILED,
    asked_once,
    cannot_take,
    cannot_use_gpu,
    capability_of,
    constant_when_compiled,
    full_precision,
    gpu_of,
    load,
    namespace,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

EMULATOR_VARIABLE = "NATTEN_EXT_CUDA_EMULATOR"

_LIBRARY = "libnatten_ext_cuda.so"

ADD_ON = "natten_ext_cuda"
"""The package that brings the library where this one was installed without it."""

# The library has operators of its own, csrc/cuda/library.cpp, for what `run` adds to the operands.
_compiled = getattr(torch.ops, namespace("cuda"))
for _order in ORDERS:
    torch.library.define(f"{_compiled.name}::{_order.name}_kernels", _order.schema(tf32=bool))


def cannot_run(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why this backend can't run a problem; empty if it can."""
    reason = _not_loaded()
    if reason:
        return reason
    emulated = _emulator() is not None
    if device.type not in (("cpu", "meta") if emulated else ("cuda", "meta")):
        return f"device must be {'cpu, where it is emulated' if emulated else 'cuda'}, got {device.type}"
    if reason := cannot_take(dtype, DTYPES, head_dim):
        return reason
    if device.type == "meta":
        return ""
    if device.type == "cuda":
        if reason := cannot_use_gpu(device):
            return reason
        gpu = gpu_of(device)
        _warn_of_ptx(gpu)
        limit = _shared_limit(gpu)
    else:
        limit = _ask_shared_limit(0)
    most = _most_channels(dtype, limit)
    if head_dim > most:
        return f"head_dim in {dtype} must be at most {most} with the shared memory of this GPU, got {head_dim}"
    return ""


def run(order: Order, arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """The results of an order; RuntimeError where there are no kernels."""
    if reason := _not_loaded():
        raise RuntimeError(f"backend 'cuda' cannot run this: {reason}")
    query = arguments[order.query]
    tf32 = not full_precision(query.dtype)
    # l2 scores need vectors near zero: far from it, their products would cancel. Those of bfloat16 are sums of 16-bit
    # numbers in float32, which lose nothing.
    if arguments[order.l2] and query.dtype != torch.bfloat16:
        arguments = about_origin(order, arguments, tf32=tf32)
    try:
        return getattr(_compiled, f"{order.name}_kernels")(*arguments, tf32)
    except RuntimeError as error:
        # What passes the stable ABI is a RuntimeError; callers catch torch's own kind, to try a smaller batch.
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


@asked_once
def _warn_of_ptx(device: int) -> None:
    """Warns, once per GPU, where the library has no code for it, so that the driver compiles each kernel first."""
    major, minor = capability_of(device)
    capabilities = [divmod(int(number), 10) for number in _compiled.capabilities().split(":")]
    if not any(major == has_major and minor >= has_minor for has_major, has_minor in capabilities):
        has = ", ".join(f"{has_major}.{has_minor}" for has_major, has_minor in capabilities)
        warnings.warn(
            f"{_LIBRARY} has code for compute capability {has} and none for {major}.{minor}: the driver compiles its"
            f" kernels at first use, minutes in all. TORCH_CUDA_ARCH_LIST={major}.{minor} at installation avoids that",
            RuntimeWarning,
            stacklevel=2,
        )


@constant_when_compiled
def _ask_shared_limit(device: int) -> int:
    """Bytes of shared memory that a GPU gives a block; tests change those of the emulated one."""
    return _compiled.shared_memory("float32", 1, device)[1]


_shared_limit = asked_once(_ask_shared_limit)


@asked_once
def _most_channels(dtype: torch.dtype, limit: int) -> int:
    """The largest head_dim whose blocks, of all orders, need no more than ``limit`` bytes of shared memory; 0: none."""
    name = str(dtype).removeprefix("torch.")
    needed = (_compiled.shared_memory(name, d, 0)[0] for d in range(1, MAX_HEAD_DIM + 1))
    return sum(bytes_needed <= limit for bytes_needed in needed)


def library_folder() -> Path | None:
    """Where the compiled kernels are: this package, or the one that was installed for them; None without either."""
    folders = [Path(__file__).parents[1]]
    if (add_on := find_spec(ADD_ON)) is not None and add_on.origin is not None:
        folders.append(Path(add_on.origin).parent)
    return next((folder for folder in folders if (folder / _LIBRARY).exists()), None)


def _emulator() -> str | None:
    return os.environ.get(EMULATOR_VARIABLE) or None


@asked_once
def _not_loaded() -> str:
    """Loads the kernels. Empty if they are there, else why not."""
    if not COMPILED:
        return NOT_COMPILED
    if (path := _emulator()) is not None:
        try:
            return load(path, _compiled)
        except OSError as error:
            return f"{EMULATOR_VARIABLE} is {path!r}, which does not load: {_why(error)}"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    folder = library_folder()
    if folder is None:
        return (
            f"{ADD_ON} is not installed, and no library was built when natten_ext was: torch had no CUDA, there was no"
            " nvcc, or NATTEN_EXT_CUDA=0 was set"
        )
    if folder.name == ADD_ON and (found := version(ADD_ON)) != __version__:
        return f"{ADD_ON} must have the version of natten_ext, {__version__}, got {found}"
    try:
        return load(folder / _LIBRARY, _compiled)
    except OSError as error:
        return f"{_LIBRARY} does not load: {_why(error)}"


def _why(error: OSError) -> BaseException:
    """torch's own error names only the file that does not load; its cause says what is wrong with it."""
    return error.__cause__ or error
