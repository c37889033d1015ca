"""The least time a step can take on this machine: bytes, multiply-adds and exponentials, against measured rates.

Useful work, per query, head and key pair (recomputation that a fused kernel adds is not counted as useful):

- products of length head_dim: forward 2 (scores, output); backward 5 (scores again, dP, dQ, dK, dV); double
  backward 12: scores, dP, the two of X = gQ K^T + Q gK^T, dO gV^T, w = P gV, u = (P X) V, the two of q_bar, the two
  of k_bar, v_bar (docs/double_backward.md; sums along rows and the norms of L2 are not counted);
  tangent 5: scores, the two of X, w, u;
- exponentials: one per pair in each of the four;
- bytes: every tensor that goes in or out, once, with one float32 statistic per query and head:
  forward q k v -> o; backward q k v o dO -> dq dk dv; double q k v o dO gq gk gv -> four gradients;
  tangent q k v gq gk gv -> dO_bar; plus tables.

A step's floor is the sum over its stages (``forward``: forward; ``backward``: forward and backward; ``double``: these
and the double backward; ``tangent``: forward and tangent) of the largest of the three times.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import asdict, dataclass

import torch

from .shapes import Shape
from .timing import make_clock
from .tools import nvidia_smi

STAGES = {
    "forward": ("forward",),
    "backward": ("forward", "backward"),
    "double": ("forward", "backward", "double"),
    "tangent": ("forward", "tangent"),
}

PRODUCTS = {"forward": 2, "backward": 5, "double": 12, "tangent": 5}
# Tensors the size of the query and of the key that a stage reads and writes, and accesses to the table.
_QUERY_SIZED = {"forward": 2, "backward": 4, "double": 6, "tangent": 3}
_KEY_SIZED = {"forward": 2, "backward": 4, "double": 6, "tangent": 4}
_TABLES = {"forward": 1, "backward": 2, "double": 2, "tangent": 2}

EXPS_PER_SM_AND_CLOCK = 16  # special-function units of every NVIDIA GPU since compute capability 3.0


@dataclass(frozen=True)
class Work:
    """What a stage can't do without. ``fmas`` are multiply-adds."""

    fmas: float
    exps: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """Measured on this machine: multiply-adds, exponentials and bytes per second."""

    fmas: float
    exps: float
    bytes: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def best(self, other: Rates) -> Rates:
        """The better of each."""
        return Rates(max(self.fmas, other.fmas), max(self.exps, other.exps), max(self.bytes, other.bytes))

    def __str__(self) -> str:
        return (
            f"{self.fmas / 1e9:.1f} G multiply-adds/s (matrix product), {self.bytes / 1e9:.1f} GB/s (copy),"
            f" {self.exps / 1e9:.2f} G exponentials/s"
        )


def stage_work(shape: Shape, stage: str, itemsize: int) -> Work:
    """Useful work of "forward", "backward", "double" (the double backward alone) or "tangent" (alone)."""
    pairs = shape.batch * shape.pairs
    query_size = shape.batch * shape.queries * shape.heads * shape.head_dim
    key_size = shape.batch * shape.key_tokens * shape.heads * shape.head_dim
    elements = _QUERY_SIZED[stage] * query_size + _KEY_SIZED[stage] * key_size
    if shape.table:
        elements += _TABLES[stage] * math.prod(shape.table_shape)
    statistics = 4 * shape.batch * shape.queries * shape.heads
    return Work(PRODUCTS[stage] * pairs * shape.head_dim, pairs, elements * itemsize + statistics)


def step_fmas(shape: Shape, order: str) -> float:
    """Useful multiply-adds of a whole step."""
    return sum(stage_work(shape, stage, 4).fmas for stage in STAGES[order])


def stage_floor(shape: Shape, stage: str, itemsize: int, rates: Rates) -> tuple[float, str]:
    """Seconds that one operator alone takes at least, and which of "fmas", "exps" and "bytes" bounds it."""
    work = stage_work(shape, stage, itemsize)
    times = {bound: getattr(work, bound) / getattr(rates, bound) for bound in ("fmas", "exps", "bytes")}
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


def step_floor(shape: Shape, order: str, itemsize: int, rates: Rates) -> tuple[float, str]:
    """Seconds that a step takes at least, and which of "fmas", "exps" and "bytes" bounds most of it."""
    by_bound = dict.fromkeys(("fmas", "exps", "bytes"), 0.0)
    for stage in STAGES[order]:
        seconds, bound = stage_floor(shape, stage, itemsize, rates)
        by_bound[bound] += seconds
    return sum(by_bound.values()), max(by_bound, key=by_bound.__getitem__)


def measure_rates(device: torch.device, dtype: torch.dtype, samples: int = 12, small: bool = False) -> Rates:
    """Peak rates: the best of several samples of a large matrix product, a copy, and an exponential.

    Multiply-adds: on a CPU the better of ``dtype`` and float32, since low precision is computed in float32 there.
    Exponentials: on a CPU ``torch.exp`` on a buffer that stays in cache; on a GPU the rate of the special-function
    units, since ``torch.exp`` is bound by memory.

    ``small``: on a CPU smaller operands, of which nobody expects the peak. Some CPUs take seconds for a large product
    in bfloat16.
    """
    clock = make_clock(device)

    def best(call, units: float) -> float:
        call()
        return units / min(clock.sample(call, 1) for _ in range(samples))

    on_cpu = device.type == "cpu"
    n = 8192 if not on_cpu else 256 if small else 1536
    fmas = 0.0
    for compute in {dtype, torch.float32} if on_cpu else {dtype}:
        a, b = (torch.randn(n, n, device=device).to(compute) for _ in range(2))
        product = torch.empty_like(a)
        fmas = max(fmas, best(functools.partial(torch.mm, a, b, out=product), float(n) ** 3))

    source = torch.ones(1 << (28 if not on_cpu else 20 if small else 26), device=device)
    target = torch.zeros_like(source)
    copy = best(lambda: target.copy_(source), 2.0 * source.nbytes)

    if on_cpu:
        x = torch.linspace(-8, 0, 1 << 16)
        out = torch.empty_like(x)

        def many_exps() -> None:
            for _ in range(64):
                torch.exp(x, out=out)

        exps = best(many_exps, 64.0 * x.numel())
    else:
        properties = torch.cuda.get_device_properties(device)
        exps = float(properties.multi_processor_count * EXPS_PER_SM_AND_CLOCK * _clock_hertz(properties))
    return Rates(fmas, exps, copy)


def _clock_hertz(properties: object) -> float:
    """The GPU's highest clock; 1.7 GHz (between an A100 and an H100) where neither torch nor nvidia-smi tells."""
    if hasattr(properties, "clock_rate"):  # in kHz; not in every torch
        return 1e3 * properties.clock_rate
    with contextlib.suppress(ValueError, IndexError):
        return 1e6 * float(nvidia_smi("clocks.max.sm")[0].split()[0])
    return 1.7e9
