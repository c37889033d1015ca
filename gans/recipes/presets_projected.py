"""Recipes of Projected GANs: the projected discriminator with FastGAN's generator, and with transformers.

Learning rates, batch, loss and average are the published code's for FastGAN; see docs/projected.md.
"""

from __future__ import annotations

from dataclasses import replace

from gans.data.loading import DataConfig
from gans.losses.adversarial import LossConfig
from gans.models.ema import EMAConfig
from gans.models.fastgan import FastGANGeneratorConfig
from gans.models.projected import ProjectedDiscriminatorConfig
from gans.models.transgan import GeneratorConfig
from gans.recipes.config import Preset, TrainConfig

LAZY = 16 / 17
"""The published code keeps StyleGAN2's correction of the discriminator's optimiser, though it has no lazy penalty."""

PROJECTED256 = TrainConfig(
    generator=FastGANGeneratorConfig(),
    discriminator=ProjectedDiscriminatorConfig(),
    loss=LossConfig(adversarial="hinge", gp_weight=0, drift=0),
    ema=EMAConfig(half_life=20_000, rampup=0.05),
    steps=156_250,
    n_critic=1,
    batch_d=64,
    batch_g=64,
    lr_d=2e-4 * LAZY,
    lr_g=2e-4,
    betas_d=(0.0, 0.99**LAZY),
    clip=0,
)
"""The published recipe at 256 px: 10 M images."""


def _sized(size: int, **generator: int | bool) -> TrainConfig:
    return replace(
        PROJECTED256,
        generator=FastGANGeneratorConfig(image_size=size, **generator),  # type: ignore[arg-type]
        discriminator=ProjectedDiscriminatorConfig(image_size=size),
    )


PROJECTED32_SMALL = replace(
    _sized(32, width=16, lite=True, skip_ratio=8),
    discriminator=ProjectedDiscriminatorConfig(
        image_size=32, feature_size=128, width=32, augment=("translation_0.125", "cutout_ratio_0.2")
    ),
    loss=replace(PROJECTED256.loss, out_of_range=100),
    ema=EMAConfig(half_life=500),
    steps=800,
    batch_d=8,
    batch_g=8,
    lr_g=6e-4,
)
"""An eighth of the generator's channels, half of the discriminators', features of 128 px: for a CPU. DiffAug's colours
would hide those of the images from the discriminator in so few steps.
"""

TRANSGAN32 = replace(
    PROJECTED256,
    generator=GeneratorConfig(),
    discriminator=ProjectedDiscriminatorConfig(image_size=32),
    lr_d=1e-4,
    lr_g=1e-4,
)
"""TransGAN's CIFAR-10 generator against the projected discriminator, at TransGAN's learning rate."""

TRANSGAN32_SMALL = replace(
    PROJECTED32_SMALL,
    generator=GeneratorConfig(latent_dim=128, base_dim=256, depths=(1, 1, 1)),
    steps=320,
    lr_g=1e-3,
    decay_start=160,
    decay_end=320,
    decay_to=0.1,
)
"""The generator of `cifar10-small`, at its learning rate, against the same discriminator; without the decay it lost
what it had learned after 250 steps.
"""

DIGITS = replace(
    PROJECTED32_SMALL,
    generator=replace(PROJECTED32_SMALL.generator, channels=1),
    discriminator=replace(PROJECTED32_SMALL.discriminator, channels=1, pixel_width=32),
    images=DataConfig(flip=False),
    ema=EMAConfig(half_life=2_000),
    steps=750,
    batch_d=16,
    batch_g=16,
    decay_start=350,
    decay_end=750,
    decay_to=0.05,
)
"""The same networks on scikit-learn's scanned digits at 32 px grey, with a second discriminator on pixels."""

PRESETS = {
    "projected256": Preset(PROJECTED256, "published", "Projected GAN, FastGAN, 256 px"),
    "projected256-lite": Preset(_sized(256, lite=True), "published", "Projected GAN, FastGAN lite, 256 px: small sets"),
    "projected1024": Preset(_sized(1024), "published", "Projected GAN, FastGAN, 1024 px"),
    "projected64": Preset(_sized(64), "ours", "Projected GAN, FastGAN, 64 px by the same rule"),
    "projected32": Preset(_sized(32, skip_ratio=8), "ours", "Projected GAN, FastGAN, 32 px, gates over 8 sizes"),
    "projected32-small": Preset(PROJECTED32_SMALL, "ours", "Projected GAN, FastGAN lite, 32 px for a CPU"),
    "projected-transgan32": Preset(TRANSGAN32, "ours", "TransGAN against the projected discriminator, 32 px"),
    "projected-transgan32-small": Preset(TRANSGAN32_SMALL, "ours", "TransGAN's generator of cifar10-small there"),
    "projected-digits": Preset(DIGITS, "ours", "Projected GAN, FastGAN lite, 32 px grey: scanned digits on a CPU"),
}
