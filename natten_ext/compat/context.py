"""NATTEN's switches, and its questions about the machine.

The switches are remembered and have no effect: this package chooses its kernels by itself. Code that asks whether fused
attention is on, to choose between the fused and the unfused functions, gets what it said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_memory_usage = "default"


def _switch(on: bool) -> tuple[Callable[..., None], Callable[[], bool]]:
    """A function that turns something on or off, and one that says which it is."""

    def use(mode: bool = True) -> None:
        nonlocal on
        on = bool(mode)

    def is_on() -> bool:
        return on

    return use, is_on


use_fused_na, is_fused_na_enabled = _switch(False)
use_fna, is_fna_enabled = use_fused_na, is_fused_na_enabled
use_gemm_na, is_gemm_na_enabled = _switch(True)
use_tiled_na, is_tiled_na_enabled = _switch(True)
use_tf32_in_gemm_na, is_tf32_in_gemm_na_enabled = _switch(False)
use_kv_parallelism_in_fused_na, is_kv_parallelism_in_fused_na_enabled = _switch(True)
use_deterministic_algorithms, are_deterministic_algorithms_enabled = _switch(False)
allow_flex_compile, is_flex_compile_allowed = _switch(False)
allow_flex_compile_backprop, is_flex_compile_backprop_allowed = _switch(False)


def _turned_off(use: Callable[..., None]) -> Callable[[], None]:
    return lambda: use(False)


enable_fused_na, disable_fused_na = use_fused_na, _turned_off(use_fused_na)
enable_gemm_na, disable_gemm_na = use_gemm_na, _turned_off(use_gemm_na)
enable_tiled_na, disable_tiled_na = use_tiled_na, _turned_off(use_tiled_na)
enable_tf32, disable_tf32 = use_tf32_in_gemm_na, _turned_off(use_tf32_in_gemm_na)
disable_flex_compile = _turned_off(allow_flex_compile)
disable_flex_compile_backprop = _turned_off(allow_flex_compile_backprop)


def use_autotuner(*settings: Any, **named: Any) -> None:
    """Nothing to tune."""


enable_autotuner = disable_autotuner = use_autotuner


def is_autotuner_enabled() -> bool:
    return False


is_autotuner_enabled_for_forward = is_autotuner_enabled_for_backward = is_autotuner_enabled
is_autotuner_thorough_for_forward = is_autotuner_thorough_for_backward = is_autotuner_enabled


def set_memory_usage_preference(pref: str = "default") -> None:
    global _memory_usage
    _memory_usage = pref


def get_memory_usage_preference() -> str:
    return _memory_usage


def is_memory_usage_default() -> bool:
    return _memory_usage == "default"


def is_memory_usage_strict() -> bool:
    return _memory_usage == "strict"


def is_memory_usage_unrestricted() -> bool:
    return _memory_usage == "unrestricted"


def has_cuda(device_index: Any = None) -> bool:
    """Whether there is a GPU; all that NATTEN asks about one is answered like this."""
    return torch.cuda.is_available()


has_half = has_bfloat = has_gemm = has_fna = has_fused_na = has_cuda
has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = has_cuda
