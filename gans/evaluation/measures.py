"""Distances between two sets of feature vectors, by torchmetrics and prdc.

Frechet and kernel distances fall to zero as the sets become alike; precision and recall rise to one. Each is computed
from features `(N, D)`, so one pass through a network serves all of them.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import torch
from torch import Tensor, nn

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000


class _Given(nn.Identity):
    """The feature extractor of torchmetrics for features that are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _check(real: Tensor, fake: Tensor, least: int) -> None:
    if real.dim() != 2 or fake.dim() != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features have shapes {tuple(real.shape)} and {tuple(fake.shape)}, not (N, D) and (M, D)")
    if min(len(real), len(fake)) < least:
        raise ValueError(f"there are {len(real)} real and {len(fake)} other images; the measure needs {least} of each")


def _missing(error: ModuleNotFoundError) -> ValueError:
    return ValueError(f"measuring needs {error.name}: pip install 'natten_ext[gans]'")


def frechet(real: Tensor, fake: Tensor) -> float:
    """Frechet distance between Gaussians fitted to the sets (Heusel et al. 2017, arXiv 1706.08500), in float64.

    Over Inception's features this is FID. Its value depends on the number of images: fewer give more.
    """
    _check(real, fake, 2)
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    metric = FrechetInceptionDistance(_Given(real.shape[1]))
    metric.update(real.double().cpu(), real=True)
    metric.update(fake.double().cpu(), real=False)
    return float(metric.compute())


def kernel(real: Tensor, fake: Tensor, *, seed: int = 0) -> float:
    """Kernel distance: squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018,
    arXiv 1801.01401), unbiased, the mean over 100 random subsets of 1000 images (or as many as there are).

    Over Inception's features this is KID.
    """
    _check(real, fake, 2)
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    size = min(KERNEL_SUBSET_SIZE, len(real), len(fake))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features, which we do as well
        metric = KernelInceptionDistance(_Given(real.shape[1]), subsets=KERNEL_SUBSETS, subset_size=size)
    metric.update(real.double().cpu(), real=True)
    metric.update(fake.double().cpu(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, _ = metric.compute()
    return float(mean)


def precision_recall(real: Tensor, fake: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Precision, the share of `fake` that lies within `real`, and recall, the share of `real` within `fake`.

    A point lies within a set if it is nearer to one of its points than that one's nearest neighbour number
    `neighbours` (Kynkaanniemi et al. 2019, arXiv 1904.06991). Needs memory for three matrices of distances.
    """
    _check(real, fake, neighbours + 2)
    try:
        from prdc import compute_prdc
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the numbers of images
        found = compute_prdc(real.float().cpu().numpy(), fake.float().cpu().numpy(), nearest_k=neighbours)
    return float(found["precision"]), float(found["recall"])
