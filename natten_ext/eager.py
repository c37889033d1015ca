"""Whether a call needs torch's dispatcher: most need nothing of it, and it takes as long as a launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PLAIN_KEYS = {f"{kind}{device}" for kind in ("", "Autograd", "Autocast") for device in ("CPU", "CUDA")} | {
    "ADInplaceOrView"
}
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_MODES = {torch._C._dispatch_tls_local_include_set().raw_repr()}
with torch.inference_mode():
    _MODES.add(torch._C._dispatch_tls_local_include_set().raw_repr())


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the dispatcher would do nothing but autograd and the kernel.

    Not while torch.compile, torch.func, a mode, a trace or a profiler is to see the operator, nor below autograd, nor
    for tensors that are no plain memory on a device.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._dispatch_tls_local_include_set().raw_repr() not in _MODES
        # Inference mode records nothing anyway.
        or (torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD) and not torch.is_inference_mode_enabled())
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_function_stack()
    ):
        return False
    for tensor in tensors:
        kind = type(tensor)
        if kind is not Tensor and kind is not torch.nn.Parameter:
            return False
        keys = torch._C._dispatch_keys(tensor)
        plain_keys = _known.get(keys.raw_repr())
        if not (_plain_keys(keys) if plain_keys is None else plain_keys):
            return False
    return True


_known: dict[int, bool] = {}


def _plain_keys(keys: torch._C.DispatchKeySet) -> bool:
    names = str(keys).removeprefix("DispatchKeySet(").removesuffix(")")
    known = _known[keys.raw_repr()] = _PLAIN_KEYS.issuperset(names.split(", "))
    return known
