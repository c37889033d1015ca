"""GAT's recipes.

Rules and numbers are the published code's for ImageNet at 256 px, whose networks see 32x32 latents in patches of 2:
here images of 32 px in patches of 2, and of 64 px in patches of 4. See docs/gat.md.
"""

from __future__ import annotations

from dataclasses import replace

from gans.data.loading import DataConfig
from gans.losses.adversarial import LossConfig
from gans.models.ema import EMAConfig
from gans.models.gat import GATDiscriminatorConfig, GATGeneratorConfig
from gans.recipes.config import Preset, TrainConfig


def learning_rate(dim: int) -> float:
    """The paper's width-aware learning rate: 2e-4 at GAT-B's 768 channels, the larger the narrower."""
    return 2e-4 * 768 / dim


GAT32 = TrainConfig(
    generator=GATGeneratorConfig(),
    discriminator=GATDiscriminatorConfig(),
    loss=LossConfig(
        adversarial="relativistic",
        gp_weight=0,
        drift=0,
        r1=0.1,
        r2=0.1,
        penalty_mode="finite-difference",
        penalty_sigma=0.01,
    ),
    ema=EMAConfig(decay=0.999),
    steps=150_000,
    n_critic=1,
    batch_d=512,
    batch_g=512,
    lr_d=learning_rate(384),
    lr_g=learning_rate(384),
    clip=1.0,
    precision="bf16",
)
"""GAT-S/2 on images of 32 px: 256 tokens in G, 257 in D, as published for latents of that size. 60 epochs of ImageNet
are 150,000 steps.
"""

GAT64 = replace(
    GAT32,
    generator=GATGeneratorConfig(image_size=64, patch_size=4),
    discriminator=GATDiscriminatorConfig(image_size=64, patch_size=4),
)
"""GAT-S/4 on images of 64 px: as many tokens."""

GAT32_SMALL = replace(
    GAT32,
    generator=GATGeneratorConfig(patch_size=4, dim=96, depth=4, heads=3),
    discriminator=GATDiscriminatorConfig(patch_size=4, dim=96, depth=4, heads=3, class_dim=96),
    ema=EMAConfig(half_life=2_000),
    steps=1_000,
    batch_d=16,
    batch_g=16,
    lr_d=learning_rate(96),
    lr_g=learning_rate(96),
    precision="fp32",
)
"""A quarter of the width, a third of the depth and a quarter of the tokens: for a CPU, to see it all work."""

DIGITS = replace(
    GAT32_SMALL,
    generator=replace(GAT32_SMALL.generator, image_size=16, channels=1, mapping_lr_multiplier=0.1),
    discriminator=replace(GAT32_SMALL.discriminator, image_size=16, channels=1, augment=("translation_0.125",)),
    loss=replace(GAT32_SMALL.loss, penalty_mode="exact", r1=0.05, r2=0.05, penalty_every=4),
    images=DataConfig(flip=False),
    steps=5_400,
    batch_d=32,
    batch_g=32,
    lr_d=1e-3,
    lr_g=2e-3,
    warmup=50,
    decay_start=1_800,
    decay_end=5_400,
    decay_to=0.05,
    clip=0,
)
"""The same networks on scikit-learn's scanned digits at 16 px grey, with 16 tokens in G and 17 in D. In
tries with gradients clipped to norm 1, as above, the discriminator won (docs/lab_notes.md).
"""

PRESETS = {
    "gat32": Preset(GAT32, "ours", "GAT-S/2 on pixels, 32 px"),
    "gat64": Preset(GAT64, "ours", "GAT-S/4 on pixels, 64 px"),
    "gat32-small": Preset(GAT32_SMALL, "ours", "GAT, 32 px with a quarter of the channels"),
    "gat-digits": Preset(DIGITS, "ours", "GAT, 16 px grey: scanned digits on a CPU"),
}
