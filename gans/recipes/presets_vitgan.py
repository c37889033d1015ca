"""ViTGAN's recipes.

Sizes, loss, augmentation, optimiser and batch are the paper's. What we could not find there is its authors' later
code's (learning rate warm-up, average of the generator, images in all): see docs/vitgan.md.
"""

from __future__ import annotations

from dataclasses import replace

from gans.losses.adversarial import LossConfig
from gans.models.ema import EMAConfig
from gans.models.vitgan import ViTDiscriminatorConfig, ViTGeneratorConfig
from gans.recipes import presets_stylenat
from gans.recipes.config import Preset, TrainConfig

VITGAN32 = TrainConfig(
    generator=ViTGeneratorConfig(),
    discriminator=ViTDiscriminatorConfig(),
    loss=LossConfig(adversarial="nonsaturating", gp_weight=0, drift=0, bcr_real=10, bcr_fake=10),
    ema=EMAConfig(half_life=1_000_000, rampup=0.05),
    steps=400_000,
    n_critic=1,
    batch_d=128,
    batch_g=128,
    lr_d=2e-3,
    lr_g=2e-3,
    warmup=3_000,
    clip=0,
)
"""The paper's CIFAR-10 recipe: 64 tokens in G, 65 in D."""

VITGAN64 = replace(
    VITGAN32,
    generator=ViTGeneratorConfig(image_size=64, patch_size=8, depth=6),
    discriminator=ViTDiscriminatorConfig(image_size=64, patch_size=8, depth=6),
)
"""The paper's CelebA recipe: two more blocks, patches of twice the side, the same number of tokens."""

VITGAN128 = replace(
    VITGAN32,
    generator=ViTGeneratorConfig(image_size=128, patch_size=16, depth=6),
    discriminator=ViTDiscriminatorConfig(image_size=128, patch_size=8, depth=6),
)
"""The paper has LSUN at 128 px and says that more tokens in D are usually enough: here 257."""

VITGAN32_SMALL = TrainConfig(
    generator=ViTGeneratorConfig(latent_dim=96, dim=96, depth=2, heads=3, implicit_dim=64, mapping_depth=2),
    discriminator=ViTDiscriminatorConfig(dim=96, depth=2, heads=3),
    loss=VITGAN32.loss,
    ema=EMAConfig(half_life=2_000),
    steps=800,
    n_critic=1,
    batch_d=16,
    batch_g=16,
    lr_d=2e-3,
    lr_g=2e-3,
    clip=0,
)
"""ViTGAN at a quarter of the width and half of the depth: minutes on a CPU, to see it all work."""

DIGITS = replace(
    presets_stylenat.DIGITS,
    generator=replace(
        VITGAN32_SMALL.generator, image_size=16, channels=1, patch_size=2, head="conv", mapping_lr_multiplier=0.1
    ),
    steps=1_600,
    lr_g=4e-3,
    decay_end=1_600,
)
"""ViTGAN's generator on scikit-learn's scanned digits at 16 px, for a CPU. Its authors recommend the head later; the
discriminator, as in their later code, is a convolutional one: that of `stylenat-digits`, with its loss. Against a
transformer it has not learned digits (docs/lab_notes.md).
"""

PRESETS = {
    "vitgan32": Preset(VITGAN32, "published", "ViTGAN, 32 px"),
    "vitgan64": Preset(VITGAN64, "published", "ViTGAN, 64 px"),
    "vitgan128": Preset(VITGAN128, "ours", "ViTGAN, 128 px with 257 tokens in the discriminator"),
    "vitgan32-small": Preset(VITGAN32_SMALL, "ours", "ViTGAN, 32 px with a quarter of the channels"),
    "vitgan-digits": Preset(DIGITS, "ours", "ViTGAN's generator, 16 px grey: scanned digits on a CPU"),
}
