"""What a recipe needs, without running it: parameters, memory, attention shapes and who would compute them.

The updates are carried out on fake tensors, which have shapes and no contents (`torch`'s FakeTensorMode), with
the second derivatives of the penalties. That gives the memory of tensors; what kernels, the allocator and the images
waiting in loaders add is not in it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import natten_ext
from gans.common.backends import asked_for, must_run
from gans.common.distributed import World, choose_device
from gans.data import tables
from gans.data.sources import class_labels, open_source
from gans.models.conditioning import bind
from gans.models.spectral_norm import begin_step
from gans.recipes.config import RunConfig, TrainConfig, to_dict
from gans.recipes.registry import build
from gans.training.lock import check_folder
from gans.training.recompute import recompute_blocks
from gans.training.resume import find_start
from gans.training.steps import Networks, discriminator_gradients, generator_gradients, make_networks, precision
from gans.training.transfer import find_source


def check_files(recipe: TrainConfig, run: RunConfig) -> None:
    """Raises what training would, where the data (those of the hub, which are downloaded, aside), `out`, `resume` or
    `init` cannot be what the run asks of them. No image and no weights of networks are read.
    """
    if not run.data.startswith(tables.HUB):
        class_labels(open_source(run.data, recipe.images.split), recipe.classes, run.data)
    check_folder(Path(run.out))
    start = find_start(recipe, run, Path(run.out) / "checkpoints")
    if run.init and not start.checkpoint:
        find_source(run.init)


def parameter_counts(recipe: TrainConfig) -> dict[str, int]:
    """Parameters of the generator and the discriminator, without allocating them."""
    with torch.device("meta"):
        models = {"generator": build(recipe.generator), "discriminator": build(recipe.discriminator)}
    return {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}


class PeakMemory(TorchDispatchMode):
    """Inside FakeTensorMode, counts the bytes of tensors that operators make and that live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self._peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # fake tensors have no contents: chances come true, sizes are small
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())

    def _change(self, count: int) -> None:
        self.now += count
        self._peak = max(self._peak, self.now)

    def take_peak(self) -> int:
        """The most bytes that lived at one time since the last call."""
        peak, self._peak = self._peak, self.now
        return peak


@contextmanager
def _fake_networks(recipe: TrainConfig, device: torch.device) -> Iterator[tuple[Networks, PeakMemory]]:
    """The networks on `device` without contents; inside, all tensors are without, and their memory is counted."""
    with torch.device("meta"):
        networks = make_networks(recipe, torch.device("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
        for model in (networks.generator, networks.discriminator):
            model.to_empty(device=device)
            begin_step(model)
        if isinstance(networks.loss, nn.Module):  # some losses have state
            networks.loss.to_empty(device=device)
        yield networks, memory


def check_backend(recipe: TrainConfig, run: RunConfig) -> None:
    """ValueError with the reason where the attention backend that is asked for cannot run the networks."""
    name = asked_for(run.backend)
    if name is None:
        return
    device = choose_device(run.device)
    with must_run(name, "recipe", device), _fake_networks(recipe, device) as (networks, _), precision(recipe, device):
        like = next(networks.discriminator.parameters())
        label = like.new_zeros(2, dtype=torch.int64) if recipe.classes else None
        size, channels = recipe.generator.image_size, recipe.generator.channels
        bind(networks.generator, label)(like.new_empty(2, recipe.generator.latent_dim))
        bind(networks.discriminator, label)(like.new_empty(2, channels, size, size))


def _attention_rows(network: str, model: Any, inputs: Tensor) -> list[Any]:
    """One row for each kind of attention in a forward pass."""
    with natten_ext.record_calls() as calls, torch.no_grad():
        model(inputs)
    rows = Counter(
        (call.neighborhood, call.score, call.query_shape, call.keys, call.dtype, call.backend) for call in calls
    )
    return [
        {
            "network": network,
            "kind": kind,
            "score": score,
            "shape": list(shape),
            "keys": keys,
            "dtype": str(dtype).removeprefix("torch."),
            "calls": count,
            "backend": backend,
        }
        for (kind, score, shape, keys, dtype, backend), count in rows.items()
    ]


def describe(recipe: TrainConfig, run: RunConfig, processes: int = 1) -> dict[str, Any]:
    """The resolved settings, parameters, memory (MiB a process) and attention of a recipe, as values for JSON.

    `attention` has a row for every kind of attention in a forward pass of a process's part of a batch: its shape
    `(batch, height, width, heads, head_dim)` or `(batch, tokens, heads, head_dim)`, the keys that a query sees, how
    often it is called and the backend that computes it. The memory of an update is what it needs beyond weights,
    gradients, optimisers and average.
    """
    recipe.check_processes(processes)
    recipe.check_run(run)
    check_backend(recipe, run)
    parts = processes * recipe.accumulate
    # All parts of a batch need the same.
    part = replace(recipe, batch_d=recipe.batch_d // parts, batch_g=recipe.batch_g // parts, accumulate=1)
    device = choose_device(run.device)
    alone = World(device)
    size, channels = recipe.generator.image_size, recipe.generator.channels
    backend = natten_ext.use_backend(run.backend) if run.backend is not None else nullcontext()
    with backend, _fake_networks(recipe, device) as (networks, memory):
        models = (networks.generator, networks.discriminator)
        for model in models:
            if run.gradient_checkpointing:
                recompute_blocks(model)
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        dtype = next(networks.discriminator.parameters()).dtype

        def images(count: int) -> Tensor:
            return torch.empty(count, channels, size, size, device=device, dtype=dtype)

        real_d, real_g = images(part.batch_d), images(part.batch_g) if networks.loss.uses_real else None

        def labels(count: int) -> Tensor | None:
            return torch.zeros(count, dtype=torch.int64, device=device) if recipe.classes else None

        own_d, own_g = labels(part.batch_d), labels(part.batch_g)
        fixed = memory.now
        discriminator_gradients(0, 0, part, networks, real_d, alone, labels=own_d)
        peak_d = memory.take_peak() - fixed
        generator_gradients(0, part, networks, real_g, alone, labels=own_g)
        peak_g = memory.take_peak() - fixed
        z = torch.empty(part.batch_g, recipe.generator.latent_dim, device=device, dtype=dtype)
        with precision(recipe, device):
            attention = _attention_rows("generator", bind(networks.generator, own_g), z)
            attention += _attention_rows("discriminator", bind(networks.discriminator, own_d), real_d)
    # Adam keeps two numbers for each one that it trains, and the average is another generator.
    adam = 2 * sum(p.nbytes for model in models for p in model.parameters() if p.requires_grad)
    average = sum(t.nbytes for t in (*networks.generator.parameters(), *networks.generator.buffers()))
    fixed += adam + average
    sizes = {
        "weights, gradients, Adam and average": fixed,
        "activations, discriminator update": peak_d,
        "activations, generator update": peak_g,
        "total": fixed + max(peak_d, peak_g),
    }
    return {
        "recipe": to_dict(recipe),
        "run": to_dict(run.with_intervals(recipe.steps)),
        "processes": processes,
        "parameters": parameter_counts(recipe),
        "memory_mib": {name: round(count / 2**20, 1) for name, count in sizes.items()},
        "attention": attention,
    }
