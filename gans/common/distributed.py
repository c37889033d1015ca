"""Processes and devices, through Hugging Face Accelerate; sums over processes.

Networks are not wrapped in DistributedDataParallel: its hooks know nothing of gradients of gradients, and they
would start one reduction for each of the loss's backward passes. Every process computes the gradients of its part
of the batch, and `World.average_gradients` brings them together once per update.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, distributed, nn

BUCKET = 2**24
"""Gradients travel together in messages of about this many numbers."""


@dataclass(frozen=True)
class World:
    """The processes of a run; this one is number `rank` of `size` and works on `device`."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the progress bar."""
        return self.rank == 0

    def barrier(self) -> None:
        """Returns when all processes have arrived."""
        if self.size > 1:
            PartialState().wait_for_everyone()

    def leave(self) -> None:
        """Ends this process's part in the exchange; nothing here may be used with other processes afterwards."""
        if self.size > 1:
            PartialState().destroy_process_group()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes, without a graph."""
        values = values.detach()
        return _Sum.apply(values) / self.size if self.size > 1 else values

    def from_main(self, value: Any) -> Any:
        """What the main process gives as `value`, in all; all have to ask."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values, 0, device=self.device)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; all have to ask."""
        return flag if self.size == 1 else self.mean(torch.tensor(float(flag), device=self.device)).item() > 0

    def average_gradients(self, model: nn.Module) -> None:
        """Replaces the gradients of `model` by their mean over all processes.

        A parameter must have a gradient in all processes or in none.
        """
        if self.size == 1:
            return
        for bucket in _buckets(p.grad for p in model.parameters() if p.grad is not None):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            distributed.all_reduce(flat)
            flat /= self.size
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (gradient.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) > BUCKET):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU if torch sees one. ValueError for what torch cannot use here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # of "meta" there are no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device is {name!r}, which torch cannot use here: {error}") from error
    return device


def join(device: str) -> World:
    """This process's place among those that `torchrun` has started, or a world of one.

    `device` is "auto" or a torch device; of several processes each takes the GPU of its local number.
    """
    chosen = choose_device(device)
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal():
        raise ValueError(f"WORLD_SIZE must be a number of processes, got {size!r}")
    if int(size) == 1:
        return World(chosen)
    state = PartialState(cpu=chosen.type == "cpu")
    return World(state.device, state.process_index, state.num_processes)


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs, which makes it differentiable any number of times."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def batch_mean(x: Tensor) -> Tensor:
    """The mean over the first axis and over all processes, differentiable.

    For terms that are not themselves means over images, such as the square of a mean score: with it, several
    processes minimise what one process would with the whole batch.
    """
    mean = x.mean(0)
    if distributed.is_initialized() and (size := distributed.get_world_size()) > 1:
        mean = _Sum.apply(mean) / size
    return mean
