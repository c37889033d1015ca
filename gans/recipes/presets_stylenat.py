"""StyleNAT's recipes.

Networks, loss, optimiser, decay and average are those of the published code and of StyleSwin's, which it follows; see
docs/stylenat.md. R1 is taken of images in [-1, 1] here and of images with ImageNet's deviation there: gamma is
multiplied by the square of that deviation, 2 * 0.226, which gives the same penalty.
"""

from __future__ import annotations

from dataclasses import replace

from gans.data.loading import DataConfig
from gans.losses.adversarial import LossConfig
from gans.models.ema import EMAConfig
from gans.models.stylenat import StyleNATGeneratorConfig
from gans.models.stylenat_discriminator import StyleNATDiscriminatorConfig
from gans.recipes.config import Preset, TrainConfig

R1_UNITS = (2 * 0.226) ** 2
"""From gamma for normalised images to gamma for images in [-1, 1]; 0.226 is the mean deviation of the channels."""

LAZY = 16 / 17
"""StyleGAN2's correction of the discriminator's learning rate and betas for a penalty every 16 steps."""

FFHQ256 = TrainConfig(
    generator=StyleNATGeneratorConfig(),
    discriminator=StyleNATDiscriminatorConfig(),
    loss=LossConfig(
        adversarial="nonsaturating",
        gp_weight=0,
        drift=0,
        r1=10 * R1_UNITS,
        penalty_every=16,
        bcr_real=10,
        bcr_fake=10,
        bcr_against="augmented",
    ),
    ema=EMAConfig(decay=0.5 ** (32 / 10_000)),
    steps=1_000_000,
    n_critic=1,
    batch_d=64,
    batch_g=64,
    lr_d=2e-4 * LAZY,
    lr_g=5e-5,
    betas_d=(0.0, 0.99**LAZY),
    decay_start=775_000,
    decay_end=1_000_000,
    penalty_update="own",
)
"""The published FFHQ 256 px recipe: G 48.9 M and D 26.2 M parameters, 8 images on each of 8 GPUs."""

FFHQ1024 = replace(
    FFHQ256,
    generator=StyleNATGeneratorConfig(
        dims=(512, 512, 512, 512, 512, 256, 128, 64, 32),
        dilations=("1", "1,2", "1,4", "1,8", "1,16", "1,32", "1,64", "1,128"),
    ),
    discriminator=StyleNATDiscriminatorConfig(image_size=1024),
    loss=replace(FFHQ256.loss, bcr_real=0, bcr_fake=0),
    steps=800_000,
    batch_d=16,
    batch_g=16,
    decay_start=600_000,
    decay_end=800_000,
)
"""The published 1024 px networks, G 49.5 M and D 27.7 M parameters, with StyleSwin's recipe for that size."""

CHURCH256 = replace(
    FFHQ256,
    generator=StyleNATGeneratorConfig(
        dilations=("1", "1,2", "1,2,4", "1,2,4,8", "1,2,4,8,12,16", "1,2,4,8,12,16,24,32"),
        min_heads=8,
    ),
    loss=replace(FFHQ256.loss, r1=5 * R1_UNITS, bcr_real=0, bcr_fake=0),
    steps=1_500_000,
    batch_d=32,
    batch_g=32,
    decay_start=1_300_000,
    decay_end=1_500_000,
)
"""LSUN Church with 2 to 8 partitions of progressive dilations and at least 8 heads. The paper gives the number of
partitions, not their dilations: these are ours; the rest is StyleSwin's recipe.
"""

STYLENAT64 = TrainConfig(
    generator=StyleNATGeneratorConfig(
        latent_dim=128,
        dims=(128, 128, 128, 64, 32),
        dilations=("1", "1,2", "1,4", "1,8"),
        min_heads=2,
        depth=1,
        mapping_depth=2,
        normalization="none",
    ),
    discriminator=StyleNATDiscriminatorConfig(image_size=64, width=2048, max_dim=128, normalization="none"),
    loss=LossConfig(adversarial="nonsaturating", gp_weight=0, drift=0, r1=3.0, penalty_every=8),
    images=DataConfig(flip=False),
    ema=EMAConfig(half_life=1_000),
    steps=400,
    n_critic=1,
    batch_d=8,
    batch_g=8,
    lr_d=3e-4,
    lr_g=3e-4,
    betas_d=(0.0, 0.99),
    decay_start=100,
    decay_end=400,
)
"""StyleNAT at 64 px with a quarter of the channels and half of the blocks, for a CPU. The decay comes early: at a
constant rate the discriminator wins after some 200 steps, and samples get worse.
"""

DIGITS = replace(
    STYLENAT64,
    generator=replace(STYLENAT64.generator, latent_dim=64, dims=(128, 128, 64), dilations=("1", "1,2"), channels=1),
    discriminator=replace(STYLENAT64.discriminator, image_size=16, channels=1, width=1024),
    loss=LossConfig(adversarial="relativistic", gp_weight=0, drift=0, r1=0.1, r2=0.1, penalty_every=4),
    ema=EMAConfig(half_life=2_000),
    steps=1_200,
    batch_d=32,
    batch_g=32,
    lr_d=1e-3,
    lr_g=5e-4,
    decay_start=400,
    decay_end=1_200,
    decay_to=0.05,
)
"""StyleNAT on scikit-learn's scanned digits at 16 px, for a CPU. The loss is R3GAN's (Huang et al. 2024, arXiv
2501.05441), relativistic with R1 and R2.
"""

PRESETS = {
    "stylenat-ffhq256": Preset(FFHQ256, "published", "StyleNAT, 256 px, two dilations"),
    "stylenat-ffhq1024": Preset(FFHQ1024, "published", "StyleNAT, 1024 px; the recipe is StyleSwin's"),
    "stylenat-church256": Preset(CHURCH256, "ours", "StyleNAT, 256 px, 2 to 8 dilations of our choice"),
    "stylenat-64": Preset(STYLENAT64, "ours", "StyleNAT, 64 px with a quarter of the channels"),
    "stylenat-digits": Preset(DIGITS, "ours", "StyleNAT, 16 px grey: scanned digits on a CPU"),
}
