"""How good generated images are: features of two sets of images, and all measures between them.

What is measured are images of 8 bits, as they are saved. The reference's features are kept in a cache, under a key
that changes with the data, the size, the number of images and the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from gans.common.files import new_file, save_tensors
from gans.data.loading import to_array, to_unit_range
from gans.data.sources import ImageSource
from gans.evaluation import measures
from gans.features.network import VectorNetwork

RULE = 1
"""Number of the way in which images are read and resized; a change makes old caches unusable."""


class _Images(Dataset[Tensor]):
    """Chosen images of a source as uint8 `(C, S, S)`, by the resizing rule of `gans.data.loading`."""

    def __init__(self, source: ImageSource, rows: list[int], size: int, channels: int) -> None:
        self.source, self.rows, self.size, self.channels = source, rows, size, channels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Tensor:
        return torch.from_numpy(to_array(self.source.open(self.rows[place]), self.size, self.channels).copy())


def choose(count: int, limit: int, seed: int = 0) -> list[int]:
    """`limit` of the numbers below `count` at random, in order; all of them if there are no more, or limit is 0."""
    if limit == 0 or count <= limit:
        return list(range(count))
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def read_batches(
    source: ImageSource, rows: list[int], *, size: int, channels: int, batch: int, workers: int = 0
) -> Iterator[Tensor]:
    """Batches of uint8 images `(n, C, S, S)` in the order of `rows`; the global random state is not touched."""
    yield from DataLoader(
        _Images(source, rows, size, channels),
        batch_size=batch,
        num_workers=workers,
        generator=torch.Generator(),
        multiprocessing_context="spawn" if workers else None,
    )


@torch.no_grad()
def features_of(
    batches: Iterable[Tensor],
    networks: Sequence[VectorNetwork],
    device: torch.device,
    *,
    total: int,
    description: str,
) -> list[Tensor]:
    """Features `(N, D)`, float32 on the CPU, over each network, in one pass through `total` images.

    The batches are uint8, or floats in [-1, 1], which are rounded to 8 bits.
    """
    found: list[list[Tensor]] = [[] for _ in networks]
    with tqdm(total=total, desc=description, unit="image", dynamic_ncols=True) as bar:
        for images in batches:
            if images.dtype != torch.uint8:
                images = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
            images = to_unit_range(images.to(device))
            for network, parts in zip(networks, found, strict=True):
                parts.append(network(images).float().cpu())
            bar.update(len(images))
    features = [torch.cat(parts) for parts in found]
    for network, vectors in zip(networks, features, strict=True):
        if not vectors.isfinite().all():
            raise ValueError(f"features of {description} over {network.name} are not finite")
    return features


def digest(source: ImageSource) -> str:
    """A SHA-256 that changes with the images of a source."""
    hasher = hashlib.sha256()
    for mark in source.marks():
        hasher.update(mark)
    return hasher.hexdigest()


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/natten_ext`, or `~/.cache/natten_ext`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "natten_ext"


@dataclass(frozen=True)
class Reference:
    """The real images that others are compared with, and how they are read."""

    source: ImageSource
    name: str
    """For messages: a path, or "digits"."""
    size: int
    channels: int
    limit: int = 50_000
    """The most images that are used, chosen at random; 0 for all."""
    label: int | None = None
    """The class whose images these are, or None for all."""

    def rows(self) -> list[int]:
        """The images that are used."""
        rows = range(len(self.source))
        if self.label is not None:
            labels = self.source.labels
            assert labels is not None
            rows = [row for row in rows if labels[row] == self.label]
        return [rows[place] for place in choose(len(rows), self.limit)]

    def features(
        self, network: VectorNetwork, device: torch.device, *, batch: int, workers: int, cache: Path | None
    ) -> Tensor:
        """Features `(N, D)` over `network`, from the cache folder if they are there; None for no cache."""
        rows = self.rows()
        settings = {
            "rule": RULE,
            "data": digest(self.source),
            "images": len(rows),
            "size": self.size,
            "channels": self.channels,
            "network": network.name,
            "weights": network.fingerprint,
        }
        if self.label is not None:  # labels may change without the images
            settings["rows"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
        path = cache / f"{network.name}-{key}.safetensors" if cache else None
        if path and path.is_file():
            try:
                return load_file(path)["features"]
            except (SafetensorError, KeyError, OSError) as error:
                print(f"cache {path} is unreadable ({error}) and is made anew", file=sys.stderr)
        batches = read_batches(self.source, rows, size=self.size, channels=self.channels, batch=batch, workers=workers)
        description = f"{self.name}, {network.name}"
        (found,) = features_of(batches, [network], device, total=len(rows), description=description)
        if path:
            with new_file(path) as partial:
                about = {"settings": json.dumps(settings | {"reference": self.name})}
                save_tensors({"features": found}, partial, metadata=about)
        return found


def measure(real: Tensor, fake: Tensor, name: str, *, neighbours: int = 3, manifold: int = 5000) -> dict[str, float]:
    """All measures of features `fake` against `real`, each named after the network: `frechet_judge`...

    Precision and recall compare at most `manifold` vectors of each set.
    """
    few_real, few_fake = real[choose(len(real), manifold)], fake[choose(len(fake), manifold)]
    precision, recall = measures.precision_recall(few_real, few_fake, neighbours=neighbours)
    return {
        f"frechet_{name}": measures.frechet(real, fake),
        f"kernel_{name}": measures.kernel(real, fake),
        f"precision_{name}": precision,
        f"recall_{name}": recall,
    }


def split_for_floor(real: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Two disjoint random parts of real images' features: the second stands for the `count` generated ones.

    The second has `count` vectors, or half of all where there are not so many.
    """
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    second = min(count, len(real) // 2)
    return real[order[second:]], real[order[:second]]
