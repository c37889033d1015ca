"""TransGAN's recipes."""

from __future__ import annotations

from gans.config import Preset, TrainConfig
from gans.data import DataConfig
from gans.ema import EMAConfig
from gans.transgan import DiscriminatorConfig, GeneratorConfig

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
        latent_dim=32, base_size=4, base_dim=256, depths=(1, 1, 1), windows=(4, 8, 16), channels=1
    ),
    discriminator=DiscriminatorConfig(
        image_size=16,
        channels=1,
        patch_dims=(48, 16),
        depths=(1, 1),
        windows=(8, 4),
        augment=("translation",),
    ),
    images=DataConfig(flip=False),
    ema=EMAConfig(half_life=2_000),
    steps=256,
    n_critic=2,
    batch_d=32,
    batch_g=32,
    lr_d=1e-3,
    lr_g=1e-3,
)
"""The demo: scikit-learn's scanned digits, enlarged to 16 px grey; about three minutes on two CPU cores."""

PRESETS = {
    "cifar10": Preset(CIFAR10, "published", "TransGAN, 32 px"),
    "stl10": Preset(STL10, "published", "TransGAN, 48 px"),
    "cifar10-small": Preset(CIFAR10_SMALL, "ours", "TransGAN, 32 px with a quarter or less of the channels"),
    "digits": Preset(DIGITS, "ours", "TransGAN, 16 px grey: the demo"),
}
