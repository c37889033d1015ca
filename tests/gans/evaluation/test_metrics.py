from __future__ import annotations

import pytest
import torch

from gans.data.loading import load_images
from gans.data.sources import open_source
from gans.evaluation.measures import frechet
from gans.evaluation.metrics import make_metric


def test_frechet_distance_of_known_gaussians():
    """Commuting covariances: |m|^2 + sum (sqrt(a) - sqrt(b))^2."""
    torch.manual_seed(0)
    base = torch.randn(2000, 3, dtype=torch.float64)
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(base.T))).T
    spread = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    shift = torch.tensor([0.3, 0.0, -1.0], dtype=torch.float64)
    expected = float((shift**2).sum() + ((spread - 1) ** 2).sum())
    assert frechet(base, base * spread + shift) == pytest.approx(expected, rel=1e-6)
    assert frechet(base, base) == pytest.approx(0, abs=1e-9)


def test_distance_orders_images_by_likeness():
    real = load_images(open_source("digits"), size=16, channels=1, limit=1797)
    distance = make_metric("random", real[::2])
    held_out = distance(real[1::2])
    torch.manual_seed(0)
    noisy = [distance(real[1::2] + s * torch.randn_like(real[1::2])) for s in (0.2, 0.5, 1.0)]
    assert 0 < held_out < 3 * distance.floor
    assert held_out < noisy[0] < noisy[1] < noisy[2]
    assert distance(real[1::2].flip(2)) > 2 * held_out  # upside down
    assert distance(real[1:2].expand(500, -1, -1, -1)) > 20 * held_out  # one mode only
    assert distance(real[1::2]) == held_out  # the same every time


def test_needs_images():
    with pytest.raises(ValueError, match="has 3 images"):
        make_metric("random", torch.zeros(3, 1, 8, 8))
