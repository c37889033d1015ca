"""From the operators' arguments to launches: addresses and strides, tile sizes, what is compiled.

Launches are planned on tensors without data (the device "meta"), and carried out by ``plans.py``.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...geometry import FULL, GRID, MAP_AXES, NEIGHBORHOOD, HeadWindow
from ...orders import accumulation_dtype
from ..support import full_precision
from . import configs
from .on_device import Lists
from .problem import QUERY, Problem, Tiling, problem_of, tiling
from .tiles import Rows, Static

INTERPRETED = triton.knobs.runtime.interpret

MAX_PROGRAMS = 2**31 - 1

Results = tuple[torch.Tensor | None, ...]
"""Of an order; None for what is not asked for."""

ELEMENT = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def _index_with_any_numpy() -> None:
    """Let Triton's interpreter make integers of arrays with one element, where ``int()`` fails from numpy 2.4 on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patched


def _mask_with_any_integers() -> None:
    """Let Triton 3.9's interpreter take masks of a number and a vector, which it has in int32 and then refuses."""
    from triton.runtime import interpreter

    def patched(access: Callable, place: int) -> Callable:
        def masked(builder: Any, *arguments: Any) -> Any:
            of_bool = interpreter.TensorHandle(arguments[place].data.astype(bool), tl.int1)
            return access(builder, *arguments[:place], of_bool, *arguments[place + 1 :])

        return masked

    for name, place in {"create_masked_load": 1, "create_masked_store": 2}.items():
        access = getattr(interpreter.InterpreterBuilder, name)
        setattr(interpreter.InterpreterBuilder, name, patched(access, place))


if INTERPRETED:
    _index_with_any_numpy()
    _mask_with_any_integers()


def rows_of(tensor: torch.Tensor | None) -> Rows | None:
    """Address and strides of a map or a sequence, for a kernel."""
    if tensor is None:
        return None
    batch, *axes, heads, _ = tensor.stride()
    z, y, x = *(0,) * (MAP_AXES - len(axes)), *axes
    deep = tensor.dim() == 6 and tensor.shape[1] > 1
    return Rows(tensor, batch, z if deep else (), y, x, heads)


def _aligned(arguments: Sequence[Any]) -> tuple[int, list[Any]]:
    """The power of two up to 16 that all strides are multiples of, and the arguments with strides in units of it."""
    align = math.gcd(16, *(stride for rows in arguments if isinstance(rows, Rows) for stride in rows[1:] if stride))
    units = [
        Rows(rows.pointer, *(stride and stride // align for stride in rows[1:])) if isinstance(rows, Rows) else rows
        for rows in arguments
    ]
    return align, units


def chunks_of(head_dim: int, chunk: int = 0) -> tuple[int, ...]:
    """Widths that hold ``head_dim`` channels: all ``chunk``, or powers of two from 16 to 128 with little padding."""
    if chunk:
        return (chunk,) * -(-head_dim // chunk)
    widths: list[int] = []
    left = head_dim
    while left > 0:
        power = 1 << (left - 1).bit_length()
        # A power of two that is nearly full, or one half of it and the rest.
        if power <= 16 or (power <= 128 and (left > power * 7 // 8 or len(widths) == 2)):
            widths.append(max(power, 16))
            break
        widths.append(min(power // 2, 128))
        left -= widths[-1]
    while len(widths) > 1 and widths[-2] == widths[-1] < 128:
        widths[-2:] = [2 * widths[-1]]
    return tuple(widths)


def _members(windows: tuple[HeadWindow, ...]) -> Lists:
    """Kernel, dilation, stride and whether it is causal, of every head on every axis."""
    return (windows,)


class Launched(NamedTuple):
    """One launch of a kernel. ``arguments`` hold tensors without data, as ``Rows``, ``Terms`` or alone."""

    kernel: Any
    programs: int
    arguments: tuple
    options: dict[str, Any]


class Launch:
    """One problem on one device, and the launches of the passes on it."""

    def __init__(self, operands: Any, device: torch.device | None = None) -> None:
        """Of the operands of any order (``natten_ext.orders``), on "meta", where channels and tables are contiguous.

        ``device`` is where it will run; by default the one that ``configs.assumed_architecture`` names.
        """
        self.operands = operands
        query, key, bias = operands.query, operands.key, operands.bias
        self.problem: Problem = problem_of(operands.neighborhood, query, key)
        self.device = query.device if device is None else device
        self.dtype = query.dtype
        self.l2 = operands.l2
        # -s|q-k|^2 is 2s q.k - s|k|^2 and a constant per query.
        self.scale = 2 * operands.scale if self.l2 else operands.scale
        self.query, self.key = rows_of(query), rows_of(key)
        self.table = bias
        extents = () if bias is None else bias.shape[1:]
        self.table_shape = *(1,) * (MAP_AXES - len(extents)), *extents
        self.accumulate = accumulation_dtype(self.dtype)
        batch, *tokens, heads, _ = query.shape
        self.row_shape = (batch, heads, *tokens)
        self.key_shape = (batch, key.shape[-2], *key.shape[1:-2])
        self.launches: list[Launched] = []
        self.made: list[tuple[torch.Tensor, bool]] = []
        """What the launches write, and whether it must be zero before."""
        self.kept: list[tuple[tuple[torch.Tensor, ...], Callable[..., Lists], tuple]] = []
        """What lies on the device, and what makes it (``on_device.kept_on``)."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype | None = None, zero: bool = False) -> torch.Tensor:
        """A result, or numbers that one launch leaves to others."""
        tensor = torch.empty(shape, dtype=dtype or self.accumulate, device="meta")
        self.made.append((tensor, zero))
        return tensor

    def like(self, operand: torch.Tensor | None, asked: bool = True) -> torch.Tensor | None:
        """A result with the shape and dtype of an operand; None where it is not asked for."""
        return self.empty(operand.shape, operand.dtype) if asked else None

    def on_device(self, make: Callable[..., Lists], *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Integers that are kept on the device: ``make(*arguments)``."""
        for tensors, *made in self.kept:
            if made == [make, arguments]:
                return tensors
        tensors = tuple(torch.empty(len(numbers), dtype=torch.int32, device="meta") for numbers in make(*arguments))
        self.kept.append((tensors, make, arguments))
        return tensors

    def static(self, step: str, owner: str) -> tuple[Static, Tiling, configs.Config]:
        """What the kernel of a step is compiled for, how the problem is tiled, and the step's configuration."""
        problem = self.problem
        full = full_precision(self.dtype)
        config = configs.lookup(self.device, step, problem.shape_class, self.dtype, full, problem.head_dim)
        tiles = tiling(problem, config.own, config.block, owner)
        config = configs.fitted(config, math.prod(tiles.own))
        exact = problem.kind == FULL or (problem.kind == GRID and not tiles.packed)
        static = Static(
            kind=problem.kind,
            deep=problem.deep,
            strided=problem.strided,
            causal=problem.causal,
            packed=tiles.packed,
            exact=exact,
            whole=exact and problem.fits(tiles, owner),
            l2=self.l2,
            shared=problem.shared,
            head_dim=problem.head_dim,
            align=1,
            chunks=chunks_of(problem.head_dim, config.chunk),
            streamed=config.chunk > 0,
            **dict(zip(("own_d", "own_h", "own_w"), tiles.own, strict=True)),
            **dict(zip(("block_d", "block_h", "block_w"), tiles.block, strict=True)),
            precision="ieee" if INTERPRETED else configs.precision(self.dtype, full),
            accumulate=ELEMENT[self.accumulate],
            interpreted=INTERPRETED,
        )
        return static, tiles, config

    def sizes(self, tiles: int) -> tuple[Any, ...]:
        """The integers of ``geometry.SIZES`` and, before them, the windows of the heads."""
        problem = self.problem
        members = self.on_device(_members, problem.windows)[0] if problem.kind == NEIGHBORHOOD else None
        bits = struct.unpack("<q", struct.pack("<d", self.scale))[0]
        axes = problem.extents, problem.window, self.table_shape
        if not problem.deep:
            axes = [(None, *extents[1:]) for extents in axes]
        return members, bits, problem.heads, tiles, *itertools.chain(*axes)

    def run(self, kernel: Any, step: str, owner: str, *arguments: Any, **constants: Any) -> None:
        """Plan a kernel with a program for every tile, head and image of the owner's side."""
        static, tiles, config = self.static(step, owner)
        heads = self.problem.heads if owner == QUERY else self.problem.key_heads
        programs = tiles.tiles * heads * self.problem.batch
        self.start(kernel, programs, (*arguments, *self.sizes(tiles.tiles)), config, S=static, **constants)

    def start(
        self, kernel: Any, programs: int, arguments: Sequence[Any], config: configs.Config, **constants: Any
    ) -> None:
        """Plan a kernel compiled for ``constants``: ``S``, which is told the strides' alignment, and others."""
        if programs == 0:
            return
        if programs > MAX_PROGRAMS:
            raise RuntimeError(f"the problem needs {programs} programs, more than a launch can have ({MAX_PROGRAMS})")
        align, arguments = _aligned(arguments)
        if "S" in constants:
            constants["S"] = replace(constants["S"], align=align)
        options = constants | {"num_warps": config.warps, "num_stages": config.stages}
        self.launches.append(Launched(kernel, programs, tuple(arguments), options))
