"""A process of its own, since transformers asks once whether natten is there: its models with natten and the oracle."""

from __future__ import annotations

import sys

import torch

import natten_ext.compat
from tests.ecosystem import natten_oracle

SIZES = {"patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "kernel_size": 3, "num_labels": 5}


def models(name: str):
    """The module that calls natten, and models."""
    natten_ext.compat.install()
    from transformers import DinatBackbone, DinatConfig, DinatForImageClassification
    from transformers.models.deprecated.nat import modeling_nat
    from transformers.models.deprecated.nat.configuration_nat import NatConfig
    from transformers.models.dinat import modeling_dinat

    if name == "nat":
        config = NatConfig(**SIZES, layer_scale_init_value=0.5)
        return modeling_nat, [modeling_nat.NatForImageClassification(config), modeling_nat.NatBackbone(config)]
    config = DinatConfig(**SIZES, dilations=[[1, 4], [1, 2]], layer_scale_init_value=0.5)
    return modeling_dinat, [DinatForImageClassification(config), DinatBackbone(config)]


def results(model: torch.nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of a call and the gradients of the parameters."""
    output = model(pixels)
    outputs = [output.logits] if hasattr(output, "logits") else list(output.feature_maps)
    loss = sum(one.square().mean() for one in outputs)
    used = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, used, allow_unused=True)
    return outputs + [gradient for gradient in gradients if gradient is not None]


def main(name: str) -> None:
    torch.manual_seed(0)
    module, found = models(name)
    for model in found:
        model.double().eval()  # no dropped paths
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # tables too, which begin as zeros
        pixels = torch.randn(2, 3, 48, 56).double()
        ours = results(model, pixels)
        functions = {name: getattr(module, name) for name in ("natten2dqkrpb", "natten2dav")}
        assert all(function.__module__.startswith("natten_ext.") for function in functions.values())
        for function in functions:
            setattr(module, function, getattr(natten_oracle, function))
        expected = results(model, pixels)
        for function, original in functions.items():
            setattr(module, function, original)
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)
        print(type(model).__name__, len(ours), "results agree")


if __name__ == "__main__":
    main(sys.argv[1])
