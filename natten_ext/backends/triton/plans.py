"""Plans: what an order launches for operands of one kind, worked out once and carried out by every later call.

A call looks its plan up by all that decides what is launched: shapes, strides, dtypes, devices and alignments of the
operands, the other arguments, and the settings that change the choice. A plan holds no tensor of any call.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import triton

from ...orders import CHOICES, Order
from ..origin import about_origin
from ..support import full_precision
from . import configs, on_device
from .backend import cannot_run
from .backward import backward
from .double_backward import double_backward
from .forward import forward
from .launch import INTERPRETED, Launch, Launched, Results
from .operands import check_operands

PLANNERS = {"forward": forward, "backward": backward, "double_backward": double_backward}

MOST = 1024
"""Plans that are kept; then the oldest goes."""

ALIGNMENT = 16
"""Bytes: Triton compiles separately for addresses that are multiples of it, and for others."""

_KNOBS = triton.knobs.runtime

_OTHERS = len(CHOICES) + 1
"""Arguments of an order after its tensors."""


def planned(order: Order, operands: Any, device: torch.device | None = None) -> tuple[Launch, Results]:
    """The launches of an order, and its results among the tensors without data; ``operands`` as for ``Launch``."""
    launch = Launch(operands, device)
    asked = order.asked(operands)
    if not any(asked):
        return launch, (None,) * len(order.results)
    # A kernel that writes two gradients also makes the one that is not asked for.
    results = PLANNERS[order.name](launch)
    return launch, tuple(result if need else None for result, need in zip(results, asked, strict=True))


def _hooked() -> bool:
    """Whether a profiler is to hear of Triton's launches."""
    enter, leave = _KNOBS.launch_enter_hook, _KNOBS.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class _Step:
    """A launch with places for addresses."""

    def __init__(self, launched: Launched, sources: _Sources) -> None:
        self.kernel, self.programs, arguments, options = launched
        constants = [options[name] for name in self.kernel.arg_names[len(arguments) :]]
        self.arguments = [*arguments, *constants]
        self.options = {name: option for name, option in options.items() if name not in self.kernel.arg_names}
        self.compiled: Any = None
        # Where an address goes, and where addresses and what follows them go, as ``Rows`` and ``Terms``.
        self.alone: list[tuple[int, int]] = []
        self.rows: list[tuple[int, int, tuple]] = []
        self.pairs: list[tuple[int, int, int]] = []
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                self.alone.append((place, sources.index_of(argument)))
            elif isinstance(argument, tuple) and argument and isinstance(argument[0], torch.Tensor):
                first, *rest = argument
                if isinstance(rest[0], torch.Tensor):
                    self.pairs.append((place, sources.index_of(first), sources.index_of(rest[0])))
                else:
                    self.rows.append((place, sources.index_of(first), tuple(rest)))

    def filled(self, sources: Sequence[Any]) -> list[Any]:
        """The kernel's arguments, with addresses or with tensors."""
        arguments = self.arguments.copy()
        for place, index in self.alone:
            arguments[place] = sources[index]
        for place, index, rest in self.rows:
            arguments[place] = (sources[index], *rest)
        for place, first, second in self.pairs:
            arguments[place] = (sources[first], sources[second])
        return arguments

    def launch(self, addresses: list[int], stream: int, hooked: bool) -> None:
        """The compiled kernel."""
        compiled, arguments = self.compiled, self.filled(addresses)
        if hooked:
            compiled[(self.programs, 1, 1)](*arguments, stream=stream)
        else:  # half the time of it
            function, metadata = compiled.function, compiled.packed_metadata
            compiled.run(self.programs, 1, 1, stream, function, metadata, None, None, None, *arguments)

    def typed(self, tensors: Sequence[Any]) -> list[Any]:
        """The kernel's arguments as Triton compiles for them."""
        arguments = self.filled(tensors)
        for place, *_ in (*self.rows, *self.pairs):
            arguments[place] = type(self.arguments[place])(*arguments[place])
        return arguments


class _Sources:
    """Where a launch's addresses come from: the operands, then what is made, what is kept, and views of these."""

    def __init__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        self._tensors = tensors
        self._places = {_storage(tensor): place for place, tensor in enumerate(tensors) if tensor is not None}
        self.views: list[tuple[int, int, int]] = []
        """Of which, and how far from its start in elements and in bytes."""

    def index_of(self, tensor: torch.Tensor) -> int:
        place, offset = self._places[_storage(tensor)], tensor.storage_offset()
        if offset == 0:
            return place
        view = place, offset, offset * tensor.itemsize
        if view not in self.views:
            self.views.append(view)
        return len(self._tensors) + self.views.index(view)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Plan:
    """The launches of an order on one device, ready for the addresses of a call."""

    def __init__(self, order: Order, operands: Any, device: torch.device) -> None:
        """Of operands without data (as for ``Launch``)."""
        launch, results = planned(order, operands, device)
        self.device, self.on_gpu = device, device.type == "cuda"
        self.kept = [on_device.kept_on(device, make, *arguments) for _, make, arguments in launch.kept]
        given = list(launch.operands[:-_OTHERS])
        made = [tensor for tensor, _ in launch.made]
        sources = _Sources([*given, *made, *(tensor for tensors, _, _ in launch.kept for tensor in tensors)])
        empty = {dtype: torch.empty(0, dtype=dtype, device=device) for dtype in {tensor.dtype for tensor in made}}
        # A method of an empty tensor takes half the time of torch.empty.
        self.made = [(empty[tensor.dtype].new_empty_strided, tuple(tensor.shape), tensor.stride()) for tensor in made]
        self.zeros = [len(given) + index for index, (_, zero) in enumerate(launch.made) if zero]
        self.results = [None if result is None else sources.index_of(result) for result in results]
        self.steps = [_Step(launched, sources) for launched in launch.launches]
        self.compiled = False
        self.views = sources.views
        self.kept_addresses = [tensor.data_ptr() for tensors in self.kept for tensor in tensors]

    def run(self, operands: Sequence[torch.Tensor | None], addresses: list[int]) -> Results:
        """The results of a call; ``addresses`` are its operands', and are changed."""
        tensors = [*operands]
        bits = 0
        for make, shape, strides in self.made:
            tensor = make(shape, strides)
            tensors.append(tensor)
            address = tensor.data_ptr()
            addresses.append(address)
            bits |= address
        for index in self.zeros:
            tensors[index].zero_()
        if self.kept:
            addresses += self.kept_addresses
            if on_device.capturing(self.on_gpu):
                for kept in self.kept:
                    on_device.keep_for_good(kept)
        for place, _, distance in self.views:
            addresses.append(addresses[place] + distance)
        # Allocators give aligned memory, all that are known.
        ready = bits % ALIGNMENT == 0
        if self.on_gpu and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                self._launch(tensors, addresses, ready)
        else:
            self._launch(tensors, addresses, ready)
        return tuple([None if index is None else tensors[index] for index in self.results])

    def _launch(self, tensors: list[Any], addresses: list[int], ready: bool) -> None:
        """On the current stream of the current device, which is the plan's."""
        if INTERPRETED or not ready or not self.compiled:
            for step in self.steps:
                self._compile_and_launch(step, tensors)
            self.compiled = True
        else:
            stream, hooked = triton.runtime.driver.active.get_current_stream(self.device.index), _hooked()
            for step in self.steps:
                step.launch(addresses, stream, hooked)

    def _compile_and_launch(self, step: _Step, tensors: list[Any]) -> None:
        step.compiled = step.kernel[(step.programs,)](*step.typed(self.all_tensors(tensors)), **step.options)

    def all_tensors(self, tensors: list[Any]) -> list[Any]:
        """Beside the operands and what is made, what is kept, and views."""
        tensors = [*tensors, *(tensor for kept in self.kept for tensor in kept)]
        return tensors + [tensors[place].flatten()[elements:] for place, elements, _ in self.views]


class _Preparation:
    """What operands need before there is a plan for them: kernels want contiguous channels and tables.

    l2 scores need vectors near zero: far from it, their products would cancel. Sums of products of bfloat16 lose
    nothing in float32.
    """

    def __init__(self, operands: Any, moved: bool) -> None:
        self.copied = [
            index
            for index, (name, tensor) in enumerate(zip(operands._fields, operands, strict=True))
            if isinstance(tensor, torch.Tensor) and not _fit(name, tensor)
        ]
        self.moved = operands.l2 and operands.query.dtype != torch.bfloat16 and not moved

    def __bool__(self) -> bool:
        return bool(self.copied) or self.moved

    def prepared(self, order: Order, arguments: Sequence[Any]) -> list[Any]:
        arguments = [*arguments]
        for index in self.copied:
            arguments[index] = arguments[index].contiguous()
        if self.moved:
            tf32 = not full_precision(arguments[order.query].dtype)
            arguments = about_origin(order, arguments, tf32=tf32)
        return arguments


def _fit(name: str, tensor: torch.Tensor) -> bool:
    whole = name.endswith("bias") or name == "grad_lse"
    return tensor.is_contiguous() or (not whole and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1))


def _without_data(order: Order, arguments: Sequence[Any]) -> Any:
    """The operands on "meta"."""
    return order.operands(*(
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x
        for x in arguments
    ))  # fmt: skip


_plans: dict[tuple, Plan | _Preparation] = {}
_lock = threading.Lock()


def run(order: Order, arguments: Sequence[Any], moved: bool = False) -> Results:
    """The results of an order, None where one is not asked for; RuntimeError where it can't run.

    ``moved`` says that ``_Preparation`` has moved queries and keys.
    """
    operands, others = arguments[:-_OTHERS], arguments[-_OTHERS:]
    try:
        key, addresses = _kind(order, operands, others, moved)
    except RuntimeError:  # of a tensor without strides or an address
        check_operands(order.operands(*arguments))
        raise
    plan = _plans.get(key)
    if plan is None:
        plan = _new(order, arguments, moved)
        with _lock:
            _plans[key] = plan
            if len(_plans) > MOST:
                del _plans[next(iter(_plans))]
    if isinstance(plan, _Preparation):
        return run(order, plan.prepared(order, arguments), True)
    return plan.run(operands, addresses)


def _kind(
    order: Order, operands: Sequence[torch.Tensor | None], others: Sequence[Any], moved: bool
) -> tuple[tuple, list[int]]:
    """All that a plan depends on, and the operands' addresses."""
    code, l2, scale, asked = others
    kind = [
        order.name,
        tuple(code),
        l2,
        scale,
        asked if asked.__class__ is bool else tuple(asked),
        moved,
        configs.state,
        full_precision(operands[order.query].dtype),
    ]
    addresses = []
    for tensor in operands:
        if tensor is None:
            address = 0
            kind.append(None)
        else:
            address = tensor.data_ptr()
            kind += tensor.shape, tensor.stride(), tensor.dtype, tensor.device, address % ALIGNMENT
        addresses.append(address)
    return tuple(kind), addresses


def _new(order: Order, arguments: Sequence[Any], moved: bool) -> Plan | _Preparation:
    operands = order.operands(*arguments)
    check_operands(operands)
    query = operands.query
    if reason := cannot_run(query.device, query.dtype, query.shape[-1]):
        raise RuntimeError(f"backend 'triton' cannot run this: {reason}")
    return _Preparation(operands, moved) or Plan(order, _without_data(order, arguments), query.device)
