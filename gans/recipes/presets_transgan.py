"""TransGAN's recipes."""

from __future__ import annotations

from dataclasses import replace

from gans.data.loading import DataConfig
from gans.losses.adversarial import LossConfig
from gans.models.ema import EMAConfig
from gans.models.transgan import DiscriminatorConfig, GeneratorConfig
from gans.recipes.config import Preset, TrainConfig

CIFAR10 = TrainConfig()
"""TransGAN's published CIFAR-10 recipe: 32 px, G 83.3 M and D 10.2 M parameters."""

STL10 = TrainConfig(
    generator=GeneratorConfig(latent_dim=512, base_size=12, depths=(7, 5, 3), windows=(12, 24, 48), norm="rms"),
    discriminator=DiscriminatorConfig(
        image_size=48, windows=(24, 12), norm="rms", augment=("translation", "stl_erase_ratio", "color")
    ),
    ema=EMAConfig(rampup=0.05),
    n_critic=5,
    batch_d=32,
    batch_g=64,
)
"""TransGAN's published STL-10 recipe: 48 px, G 168.5 M and D 10.3 M parameters."""

CHURCH256 = TrainConfig(
    generator=GeneratorConfig(
        latent_dim=512,
        depths=(5, 4, 4, 4, 4, 4),
        windows=(8, 16, 32, 16, 16, 16),
        norm="rms",
        noise=True,
        bicubic=2,
    ),
    discriminator=DiscriminatorConfig(
        image_size=256,
        patch_size=4,
        patch_dims=(288, 48, 48),
        depths=(3, 3, 4),
        windows=(16, 32, 16),
        full_blocks=(1, 0, 0),
        noise=False,
        augment=("translation", "erase_ratio", "color"),
    ),
    ema=EMAConfig(decay=0.995),
    accumulate=4,
)
"""TransGAN's published LSUN-Church recipe: 256 px, G 205.3 M and D 17.8 M parameters."""

CELEBAHQ256 = replace(
    CHURCH256,
    generator=replace(CHURCH256.generator, depths=(0, 4, 4, 4, 4, 4), anti_alias=2, cross_attention=True),
    discriminator=DiscriminatorConfig(
        image_size=256,
        patch_size=2,
        patch_dims=(96, 96, 192),
        depths=(3, 3, 4),
        windows=(4, 4, 32),
        full_blocks=(0, 1, 0),
        overlap=True,
        rel_pos_bias=False,
        noise=False,
        augment=("filter", "translation", "erase_ratio", "color", "hue"),
    ),
)
"""TransGAN's published CelebA-HQ recipe: 256 px, G 212.9 M and D 13.3 M parameters. Its first stage has no blocks."""

TRANSGAN128 = replace(
    CHURCH256,
    generator=replace(CHURCH256.generator, depths=(5, 4, 4, 4, 4), windows=(8, 16, 32, 16, 16)),
    discriminator=replace(CHURCH256.discriminator, image_size=128, patch_size=2),
)
"""Church's rule at 128 px: G's last stage left out, D's patches half as large. Never published."""

TRANSGAN64 = replace(
    CHURCH256,
    generator=replace(CHURCH256.generator, depths=(5, 4, 4, 4), windows=(8, 16, 32, 16)),
    discriminator=replace(CHURCH256.discriminator, image_size=64, patch_size=2, windows=(16, 16, 8)),
)
"""Church's rule at 64 px: G's last two stages left out; D's stages see 32x32, 16x16 and 8x8 patches. Ours."""

CIFAR10_SMALL = TrainConfig(
    generator=GeneratorConfig(latent_dim=128, base_dim=256, depths=(1, 1, 1)),
    discriminator=DiscriminatorConfig(patch_dims=(48, 16), depths=(1, 1)),
    ema=EMAConfig(half_life=2_000),
    steps=400,
    n_critic=2,
    batch_d=16,
    batch_g=16,
    lr_d=1e-3,
    lr_g=1e-3,
)
"""CIFAR-10's maps, windows and losses with a quarter or less of the channels: minutes on a CPU, to see it all
work.
"""

DIGITS = TrainConfig(
    generator=GeneratorConfig(
        latent_dim=32, base_size=4, base_dim=128, depths=(1, 1, 1), windows=(4, 8, 16), heads=2, channels=1
    ),
    discriminator=DiscriminatorConfig(
        image_size=16,
        channels=1,
        patch_dims=(48, 16),
        depths=(1, 1),
        windows=(8, 4),
        heads=2,
        linear_init="torch",
        augment=("translation",),
    ),
    loss=LossConfig(adversarial="relativistic", gp_weight=0, drift=0, r1=0.004, r2=0.004, penalty_every=4),
    images=DataConfig(flip=False),
    ema=EMAConfig(half_life=2_000),
    steps=1_000,
    n_critic=1,
    batch_d=32,
    batch_g=32,
    lr_d=1e-3,
    lr_g=1e-3,
    decay_start=388,
    decay_end=1_000,
    decay_to=0.05,
)
"""The demo: scikit-learn's scanned digits, enlarged to 16 px grey; about three minutes on two CPU cores.

The loss is R3GAN's (Huang et al. 2024, arXiv 2501.05441), relativistic with R1 and R2, which is cheaper and steadier
here than WGAN-GP. N(0, 0.02^2), which the published discriminators start from, is made for their 384 channels: 64 with
it hardly see the image at first.
"""

PRESETS = {
    "cifar10": Preset(CIFAR10, "published", "TransGAN, 32 px"),
    "stl10": Preset(STL10, "published", "TransGAN, 48 px"),
    "church256": Preset(CHURCH256, "published", "TransGAN, 256 px, LSUN-Church's recipe"),
    "celebahq256": Preset(CELEBAHQ256, "published", "TransGAN, 256 px, CelebA-HQ's recipe"),
    "transgan128": Preset(TRANSGAN128, "ours", "TransGAN, 128 px by church256's rule"),
    "transgan64": Preset(TRANSGAN64, "ours", "TransGAN, 64 px by church256's rule"),
    "cifar10-small": Preset(CIFAR10_SMALL, "ours", "TransGAN, 32 px with a quarter or less of the channels"),
    "digits": Preset(DIGITS, "ours", "TransGAN, 16 px grey: the demo"),
}
