"""Peak memory of an attention, on a CPU (resident set, so C++ scratch counts) and on CUDA (torch's allocator).

Definitions, in bytes, for every candidate alike:

- ``beyond``: the peak while **one** operator runs (the forward, the backward alone, or the double backward alone), less
  everything the user holds: its inputs and what this and the earlier operators returned. What an earlier order
  saved for this one (softmax matrices in plain PyTorch, one statistic per query in a fused kernel) therefore counts.
    forward: without a graph; beyond query, key, value, table and the output;
    backward: beyond those, the incoming gradient and the returned gradients of all leaves;
    double: beyond those, the first gradients (of query, key and value), their cotangents, and the gradients returned
    for all leaves and for the incoming gradient;
    tangent: beyond inputs, their tangents, the output and its tangent. Forward and tangent are one call here.
  Tied inputs are untied here: the sum of the two gradients of a tied tensor is autograd's doing, for any operator.
- ``returned``: the output (forward), the gradients which that operator returned, or the output and its tangent. The
  figure to reach is ``beyond / returned <= 0.25``.
- ``step``: the peak from the forward on, beyond the inputs alone; nothing else is subtracted. The step as it is timed
  may stay a little below: it can free cotangents before its peak.

On a CPU a subprocess measures (``python -m benchmarks.memory_worker``), because what malloc keeps for reuse would hide
growth: there every block from 64 KiB on is mapped when allocated and unmapped when freed. The kernel's record of the
largest resident set is reset before each run. It is exact to about 0.3 MiB (the kernel counts pages in batches);
pages that are reserved and never touched do not count, and file pages (code loaded at first use) are taken out.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

import natten_ext

from .problem import Attend, Inputs, first_gradients, tangent_step

RUNS = 3
CLEAR = 8 << 20

# Environment of the subprocess: glibc maps blocks from 64 KiB on, returns the heap's end; MKL keeps no buffers.
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "MKL_DISABLE_FAST_MM": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads must not spin beside the process that measures time
}


@dataclass(frozen=True)
class Memory:
    """Bytes; see the module's docstring."""

    beyond: int
    returned: int
    step: int

    @property
    def ratio(self) -> float:
        return self.beyond / self.returned

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "ratio": self.ratio}


class ResidentSet:
    """Peak of the process's anonymous memory. Only means something in the worker (see WORKER_ENVIRONMENT)."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)

    def current(self) -> int:
        """Bytes in use now."""
        self._release()
        fields = self._status()
        return fields["VmRSS"] - fields["RssFile"]

    def start(self) -> None:
        """Forget the peak so far."""
        self._release()
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")

    def peak(self) -> int:
        """The most bytes in use since ``start``."""
        fields = self._status()
        return fields["VmHWM"] - fields["RssFile"]

    def _release(self) -> None:
        gc.collect()
        natten_ext.backends.cpu.release_working_memory()
        if hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)

    @staticmethod
    def _status() -> dict[str, int]:
        with open("/proc/self/status") as status:
            pairs = (line.split(":", 1) for line in status)
            return {name: 1024 * int(rest.split()[0]) for name, rest in pairs if rest.rstrip().endswith("kB")}


class CudaAllocator:
    """Peak of torch's CUDA allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def current(self) -> int:
        gc.collect()
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def start(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


Meter = ResidentSet | CudaAllocator


def measure(
    attend: Attend, inputs: Inputs, order: str, meter: Meter, warm_up: Callable[[], object] | None = None
) -> Memory:
    """The largest of a few runs. ``warm_up`` runs once before, to start threads and load code; keep it tiny."""
    operators = {"forward": _forward, "backward": _backward, "double": _double, "tangent": _tangent}[order]
    inputs = inputs.untied()
    if warm_up is not None:
        warm_up()
    base = meter.current()
    beyond = step = 0
    for _ in range(RUNS):
        meter.start()
        before, held, returned = operators(attend, inputs, meter)
        peak = meter.peak()
        beyond = max(beyond, peak - base - held)
        step = max(step, before - base, peak - base)
        if beyond > CLEAR:  # far above the noise
            break
    return Memory(beyond, returned, step)


# Each runs its order's operator after those before it, and starts the meter anew in between. Returns the peak before
# that, and the bytes that the user holds in the end and that the last operator returned.
def _forward(attend: Attend, inputs: Inputs, meter: Meter) -> tuple[int, int, int]:
    size = size_of([attend(*inputs.detached())])
    return 0, size, size


def _backward(attend: Attend, inputs: Inputs, meter: Meter) -> tuple[int, int, int]:
    output = attend(inputs.query, inputs.key, inputs.value, inputs.table)
    before = meter.peak()
    meter.start()
    grads = first_gradients(output, inputs.leaves, inputs, create_graph=False).values()
    return before, size_of([output, *grads]), size_of(grads)


def _double(attend: Attend, inputs: Inputs, meter: Meter) -> tuple[int, int, int]:
    output = attend(inputs.query, inputs.key, inputs.value, inputs.table)
    first = first_gradients(output, inputs.features, inputs, create_graph=True).values()
    cotangents = [2 * grad.detach() for grad in first]
    before = meter.peak()
    meter.start()
    leaves = [*inputs.leaves.values(), inputs.weight]
    second = torch.autograd.grad(list(first), leaves, cotangents)
    return before, size_of([output, *first, *cotangents, *second]), size_of(second)


def _tangent(attend: Attend, inputs: Inputs, meter: Meter) -> tuple[int, int, int]:
    size = size_of(tangent_step(attend, inputs).values())
    return 0, size, size


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
