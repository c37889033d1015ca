"""Small generators with a mapping network, one of each kind, for the tests of what they have in common."""

from __future__ import annotations

import torch
from torch import nn

from gans.models.gat import GATGeneratorConfig
from gans.models.stylenat import StyleNATGeneratorConfig
from gans.models.styles import StyleConfig, StyleGenerator
from gans.models.vitgan import ViTGeneratorConfig
from gans.recipes.registry import build

# The first has 3 heads in two partitions at the last level, so that the published rule for the remainder is in use.
CONFIGS: dict[str, StyleConfig] = {
    "stylenat": StyleNATGeneratorConfig(
        latent_dim=6,
        dims=(16, 24, 12),
        dilations=("1,2,1,2", "1,4"),
        kernel_size=3,
        head_dim=4,
        min_heads=2,
        mapping_depth=2,
    ),
    "vitgan": ViTGeneratorConfig(
        latent_dim=6, image_size=8, patch_size=2, dim=12, depth=2, heads=3, implicit_dim=7, mapping_depth=2
    ),
    "vitgan with l2 scores and convolutions": ViTGeneratorConfig(
        latent_dim=6, image_size=8, patch_size=2, dim=12, depth=3, heads=3, mapping_depth=2, head="conv", score="l2"
    ),
    "gat": GATGeneratorConfig(latent_dim=6, image_size=8, dim=12, depth=3, heads=3, levels=3),
}


def generator_of(config: StyleConfig) -> StyleGenerator:
    """In float64, with weights large enough that everything shows."""
    torch.manual_seed(1)
    generator: StyleGenerator = build(config).double()
    for name, parameter in generator.named_parameters():
        if not name.startswith("mapping") and not any(part in name for part in (".style.", ".gamma.", ".beta.")):
            nn.init.normal_(parameter, std=0.3)
    return generator.eval()
