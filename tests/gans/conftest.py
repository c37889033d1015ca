"""Small recipes and image folders for the tests of `gans`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gans.data.loading import DataConfig
from gans.evaluation import plots
from gans.models.transgan import DiscriminatorConfig, GeneratorConfig
from gans.recipes.config import RunConfig, TrainConfig


@pytest.fixture
def tiny() -> TrainConfig:
    """8-pixel grey images, with every part of the system in use (DiffAug, noise, tables, flips)."""
    return TrainConfig(
        generator=GeneratorConfig(
            latent_dim=6,
            base_size=4,
            base_dim=32,
            depths=(1, 1),
            windows=(4, 4),
            heads=2,
            channels=1,
            noise=True,
        ),
        discriminator=DiscriminatorConfig(
            image_size=8, channels=1, patch_dims=(12, 4), depths=(1, 1), windows=(4, 2), heads=2
        ),
        images=DataConfig(flip=True),
        steps=6,
        n_critic=2,
        batch_d=4,
        batch_g=6,
        lr_d=1e-3,
        lr_g=1e-3,
    )


@pytest.fixture
def plain_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's curves are a pixel: to draw them takes longer than the training of a test."""
    monkeypatch.setattr(plots, "plot_curves", lambda lines, path, distance: Image.new("L", (1, 1)).save(path))


@pytest.fixture
def tiny_run(tmp_path: Path, plain_curves: None) -> RunConfig:
    return RunConfig(
        data="digits",
        out=str(tmp_path / "run"),
        log_every=2,
        sample_every=3,
        sample_count=4,
        checkpoint_every=2,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve 8x8 RGB images, each of one colour (20 * i, 0, 0), in nested folders and several formats."""
    root = tmp_path / "images"
    suffixes = (".png", ".bmp", ".webp", ".PNG")
    for i in range(12):
        path = root / f"part{i % 3}" / "deep" / f"image{i:02d}{suffixes[i % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"lossless": True} if path.suffix == ".webp" else {}
        Image.fromarray(np.full((8, 8, 3), (20 * i, 0, 0), dtype=np.uint8)).save(path, **options)
    (root / "notes.txt").write_text("not an image")
    return root
