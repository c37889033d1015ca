"""How a published file's tensors become ours: layouts, and their use.

A published file is a dictionary with one state dict for each network, or the state dict of one network. Its layout is
described by a `Layout`: for every tensor of our network the published name and what turns the one into the other.
Everything that the file has and the layout does not name, everything that is missing and every wrong shape is an error
that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gans.recipes.config import TrainConfig
from gans.recipes.registry import build


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from: the published tensor's name and shape, and what to do with it."""

    name: str
    shape: tuple[int, ...]
    convert: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Joined:
    """One of our tensors that is published in parts: they are put one after the other along the first axis."""

    parts: tuple[Source, ...]


@dataclass(frozen=True)
class Extra:
    """A published tensor that ours does without; it may be missing.

    `expected` gives the value that it must have for the conversion to be right, or None where any will do.
    """

    shape: tuple[int, ...]
    expected: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Layout:
    """How the networks of a recipe are published.

    `networks` says for each weights file of ours under which key the state dict is, and whether it is a "generator" or
    a "discriminator". `ignored` are the file's other keys. `sources` and `extras` are made for a model of ours, given
    on the "meta" device. Files may keep the networks in another dictionary, under the key `nested`, and lack those of
    our names in `optional`.
    """

    networks: Mapping[str, tuple[str, str]]
    ignored: frozenset[str]
    sources: Callable[[nn.Module, Container[str]], dict[str, Source | Joined]]
    """For each name in our state dict, where it comes from in a file with tensors of these names."""
    extras: Callable[[nn.Module], dict[str, Extra]]
    """For each published name without a counterpart."""
    nested: str | None = None
    optional: frozenset[str] = frozenset()


ALONE = {"generator": "generator_ema", "discriminator": "discriminator"}
"""The weights file that a state dict becomes which is published alone, by the network's kind."""


def parts_of(source: Source | Joined) -> tuple[Source, ...]:
    """The published tensors that one of ours is made of."""
    return source.parts if isinstance(source, Joined) else (source,)


def translate(state: Mapping[str, Tensor], model: nn.Module, layout: Layout, where: str) -> dict[str, Tensor]:
    """The state dict of `model` (which may be on "meta") from a published one; `where` names it in errors.

    Raises ValueError that names every unknown and missing tensor, every wrong shape and every unexpected constant.
    """
    state = {_plain_name(name): value for name, value in state.items()}
    sources, extras = layout.sources(model, state), layout.extras(model)
    wanted = {part.name: part for source in sources.values() for part in parts_of(source)}
    problems = [f"unknown: {name}" for name in state if name not in wanted and name not in extras]
    problems += [f"missing: {name}" for name in wanted if name not in state]
    problems += [
        f"{name} is no tensor: {value!r:.40}" for name, value in state.items() if not isinstance(value, Tensor)
    ]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name, source in wanted.items():
        if name in tensors and tuple(tensors[name].shape) != source.shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, not {source.shape}")
    for name, extra in extras.items():
        if name in tensors and not _fits(tensors[name], extra):
            problems.append(f"{name} is not the constant that its tensors are to be read with")
    if problems:
        raise ValueError(f"{where} does not fit this preset: {len(problems)} problems\n  " + "\n  ".join(problems))
    return {
        ours: torch.cat([part.convert(state[part.name]) for part in source.parts])
        if isinstance(source, Joined)
        else source.convert(state[source.name]).contiguous()
        for ours, source in sources.items()
    }


def _plain_name(name: object) -> str:
    return str(name).removeprefix("module.")  # of DataParallel


def _fits(value: Tensor, extra: Extra) -> bool:
    if tuple(value.shape) != extra.shape:
        return False
    # Filters are rounded in whatever way they were computed.
    return extra.expected is None or torch.allclose(value, extra.expected().to(value.dtype), rtol=1e-5, atol=1e-6)


def model_for(recipe: TrainConfig, role: str) -> nn.Module:
    """The "generator" or "discriminator" of a recipe, without contents."""
    with torch.device("meta"):
        return build(getattr(recipe, role))


def state_dicts(content: Mapping[Any, Any], recipe: TrainConfig, layout: Layout) -> dict[str, tuple[str, str, Any]]:
    """For each of our weights files that can be made: what it is called in the file, its kind, and the state dict."""
    if layout.nested is not None and isinstance(content.get(layout.nested), Mapping):
        content = {key: value for key, value in content.items() if key != layout.nested} | content[layout.nested]
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return _alone(content, recipe, layout)
    known = {key for key, _ in layout.networks.values()}
    needed = {key for ours, (key, _) in layout.networks.items() if ours not in layout.optional}
    problems = [f"missing: {key}" for key in sorted(needed - content.keys())]
    problems += [f"unknown: {key}" for key in sorted(map(str, content.keys() - known - layout.ignored))]
    problems += [
        f"{key} is a {type(content[key]).__name__}, not a state dict"
        for key in sorted(known & content.keys())
        if not isinstance(content[key], Mapping)
    ]
    if problems:
        raise ValueError("the checkpoint is not laid out as published:\n  " + "\n  ".join(problems))
    return {ours: (key, role, content[key]) for ours, (key, role) in layout.networks.items() if key in content}


def _alone(state: Mapping[str, Tensor], recipe: TrainConfig, layout: Layout) -> dict[str, tuple[str, str, Any]]:
    """As `state_dicts`, of a file that is one network's state dict: the one that shares most names with it."""
    names = {_plain_name(name) for name in state}

    def shared(role: str) -> int:
        sources = layout.sources(model_for(recipe, role), names).values()
        return sum(part.name in names for source in sources for part in parts_of(source))

    role = max(ALONE, key=shared)
    if not shared(role):
        raise ValueError(f"none of the checkpoint's {len(names)} tensors is one of this preset's networks")
    return {ALONE[role]: (f"the state dict of a {role}", role, state)}


def convert(content: Mapping[str, Any], recipe: TrainConfig, layout: Layout) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The name of each weights file and its state dict, from the dictionary in a published file."""
    for ours, (where, role, published) in state_dicts(content, recipe, layout).items():
        model = model_for(recipe, role)
        state = translate(published, model, layout, where)
        # Which names and shapes the model has is for the model to say, whatever the layout thinks.
        model.load_state_dict(state, assign=True)
        yield ours, state
