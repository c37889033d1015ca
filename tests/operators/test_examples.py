"""The examples of the documentation run, and what they differentiate has a gradient."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


def examples_of(page: str) -> dict[str, str]:
    """The first example under each heading of a page."""
    text = (DOCS / page).read_text()
    return dict(re.findall(r"^##+ ([^\n]+)\n(?:(?!^##+ ).)*?^```python\n(.*?)^```", text, re.M | re.S))


EXAMPLES = examples_of("derivatives.md")
MODELS = examples_of("choosing.md")


def test_there_are_six_and_four():
    assert (len(EXAMPLES), len(MODELS)) == (6, 4)


@pytest.mark.parametrize("title", MODELS)
def test_model_of_ones_own(title):
    """It runs, and all that it has learns."""
    torch.manual_seed(0)
    names: dict = {}
    exec(MODELS[title], names)
    names["output"].square().mean().backward()
    models = [x for x in names.values() if isinstance(x, torch.nn.Module)]
    assert any(all(p.grad is not None for p in model.parameters()) for model in models)


@pytest.mark.parametrize("title", EXAMPLES)
def test_example(title):
    torch.manual_seed(0)
    names: dict = {}
    exec(EXAMPLES[title], names)
    modules = [x for x in names.values() if isinstance(x, torch.nn.Module)]
    if "backward()" in EXAMPLES[title]:
        for module in modules:
            weights = [p for n, p in module.named_parameters() if not n.endswith(("proj.bias", "embed.bias"))]
            assert any(p.grad is not None and p.grad.abs().max() > 0 for p in weights)
    if "registers" in names:
        assert names["registers"].grad.abs().amax((0, 2, 3)).min() > 0
    if "gradients" in names:
        for name, gradient in names["gradients"].items():
            single = torch.func.grad(names["loss"])(names["parameters"], names["images"][3])[name]
            torch.testing.assert_close(gradient[3], single, rtol=1e-4, atol=1e-6)
    if "forward_over_reverse" in names:
        torch.testing.assert_close(names["forward_over_reverse"], names["reverse_over_reverse"], rtol=1e-3, atol=1e-3)
