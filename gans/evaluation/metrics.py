"""The distance between generated and real images by which a run is followed.

For the result of a run use `python -m gans evaluate`, which takes more images and has more measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gans.evaluation.measures import frechet
from gans.features.by_name import make_vectors
from gans.features.network import VectorNetwork


class Metric:
    """Fréchet distance, over a network, of images to a fixed set of real ones.

    Random features have no size of their own: a distance over them is given in units of the real images' variance, so
    that 1 is as far as real images lie from their mean. It is not FID, nor comparable with it.

    Attributes: `name`; `floor`, the distance between two halves of the real images (what a perfect generator would get
    from as many images as a half has); `count`, how many real images there are.
    """

    def __init__(self, real: Tensor, network: VectorNetwork, batch: int = 64) -> None:
        if len(real) < 4:
            raise ValueError(f"real has {len(real)} images; a distance needs at least 4")
        self.name = f"frechet_{network.name}"
        self.count = len(real)
        self._network = network
        self._batch = batch
        self._features = self._extract(real)
        variance = float(self._features.double().var(dim=0).sum())
        self._unit = max(variance, 1e-24) if network.name == "random" else 1.0
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        self.floor = frechet(*self._features[order].tensor_split(2)) / self._unit

    @torch.no_grad()
    def _extract(self, images: Tensor) -> Tensor:
        return torch.cat([self._network(part).cpu() for part in images.split(self._batch)])

    def __call__(self, images: Tensor) -> float:
        """Distance of generated images `(N, C, H, W)` in [-1, 1] to the real ones."""
        return frechet(self._features, self._extract(images)) / self._unit


def make_metric(choice: str, real: Tensor) -> Metric:
    """The distance to `real` that `choice` names: "random", "lite1", or "judge:FILE" with a file of train-judge.

    Raises ValueError for another choice.
    """
    kind, _, file = choice.partition(":")
    if choice in ("random", "lite1") or (kind == "judge" and file):
        network = make_vectors(kind, judge=Path(file) if file else None)  # type: ignore[arg-type]
        return Metric(real, network.to(real.device))
    raise ValueError(f"metric is {choice!r}; it must be random, lite1 or judge:FILE")


def distances(lines: Sequence[dict[str, float]], floor: float | None = None) -> list[dict[str, float]]:
    """The lines of a run's log with a distance that has this floor, or else the last one's.

    Only those are comparable: a run may have gone on with another network or number of images, and so another floor.
    """
    found = [line for line in lines if "distance" in line]
    if found and floor is None:
        floor = found[-1]["floor"]
    return [line for line in found if math.isclose(line["floor"], floor, rel_tol=1e-3)]  # threads round differently
