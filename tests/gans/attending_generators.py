"""A small generator of each kind that attends, for the tests of what is seen of it."""

from __future__ import annotations

from gans.models.gat import GATGeneratorConfig
from gans.models.stylenat import StyleNATGeneratorConfig
from gans.models.transgan import GeneratorConfig
from gans.models.vitgan import ViTGeneratorConfig

GENERATORS = {
    "stylenat": StyleNATGeneratorConfig(
        latent_dim=8,
        dims=(8, 16, 12),
        dilations=("1,2", "1,2"),
        kernel_size=3,
        head_dim=4,
        min_heads=2,
        depth=2,
        mapping_depth=1,
    ),
    "transgan": GeneratorConfig(latent_dim=8, base_size=4, base_dim=64, depths=(2, 1), windows=(4, 4), heads=2),
    "vitgan": ViTGeneratorConfig(
        latent_dim=16, image_size=16, dim=32, depth=2, heads=2, implicit_dim=16, mapping_depth=1, score="l2"
    ),
    "gat": GATGeneratorConfig(latent_dim=8, image_size=16, patch_size=4, dim=16, depth=2, heads=2, levels=2),
}
