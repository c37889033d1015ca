"""StyleNAT and Projected GAN in the trainer: what moves between updates and what is remembered resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gans.losses.path_length import PathLengthLossConfig
from gans.models.fastgan import FastGANGeneratorConfig
from gans.models.projected import ProjectedDiscriminatorConfig
from gans.models.stylenat import StyleNATGeneratorConfig
from gans.models.stylenat_discriminator import StyleNATDiscriminatorConfig
from gans.recipes.config import RunConfig, TrainConfig
from gans.recipes.named import preset
from gans.training import checkpoint
from gans.training.dry_run import describe
from gans.training.loop import train

STYLENAT = replace(
    preset("stylenat-64"),
    generator=StyleNATGeneratorConfig(
        latent_dim=6,
        dims=(8, 8, 12),
        dilations=("1", "1,2"),
        head_dim=4,
        min_heads=2,
        depth=1,
        mapping_depth=1,
        style_mixing=0.5,
        channels=1,
        normalization="none",
    ),
    discriminator=StyleNATDiscriminatorConfig(
        image_size=16, channels=1, width=128, max_dim=16, group=2, normalization="none"
    ),
    loss=PathLengthLossConfig(
        r1=1.0, penalty_every=1, bcr_real=1.0, bcr_fake=1.0, bcr_against="augmented", path_length_every=1
    ),
    steps=2,
    batch_d=4,
    batch_g=4,
)
PROJECTED = replace(
    preset("projected32"),
    generator=FastGANGeneratorConfig(latent_dim=6, image_size=32, width=8, skip_ratio=8, channels=1),
    discriminator=ProjectedDiscriminatorConfig(
        image_size=32, channels=1, features="random", feature_size=128, pixel_width=8
    ),
    steps=2,
    batch_d=2,
    batch_g=2,
)


def run_of(path: Path) -> RunConfig:
    return RunConfig(data="digits", out=str(path), log_every=1, sample_every=2, sample_count=4, checkpoint_every=1)


@pytest.mark.usefixtures("plain_curves")
@pytest.mark.parametrize("recipe", [STYLENAT, PROJECTED], ids=["stylenat", "projected"])
def test_resume_is_exact(recipe: TrainConfig, tmp_path: Path):
    at_once = train(recipe, run_of(tmp_path / "at-once"), progress=False)
    first = train(replace(recipe, steps=1), run_of(tmp_path / "parts"), progress=False)
    torch.manual_seed(99)
    second = train(recipe, replace(run_of(tmp_path / "parts"), resume="latest"), progress=False)
    for name in ("generator", "generator_ema", "discriminator"):
        one, two, early = (load_file(path / f"{name}.safetensors") for path in (at_once, second, first))
        assert all(torch.equal(one[key], two[key]) for key in one)
        moving = [key for key in one if key.endswith(("left_vector", "running_mean")) and one[key].numel() > 1]
        if name == "discriminator":
            assert moving
        if name != "generator_ema":
            assert all(not torch.equal(one[key], early[key]) for key in moving)
    assert checkpoint.load_state(at_once)["step"] == 2


@pytest.mark.parametrize("recipe", [STYLENAT, PROJECTED], ids=["stylenat", "projected"])
def test_dry_run(recipe: TrainConfig, tmp_path: Path):
    """Losses with state of their own included."""
    told = describe(recipe, run_of(tmp_path))
    assert told["memory_mib"]["activations, generator update"] > 0
