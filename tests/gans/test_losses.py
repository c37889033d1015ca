"""WGAN-GP against formulas written out here, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import natten_ext
from gans.losses import WGANGP, WGANGPConfig, gradient_penalty
from gans.transgan import Discriminator


class Quadratic(torch.nn.Module):
    """D(x) = a |x|^2 / 2 + b . x: its gradient a x + b, and that gradient's derivatives, are known."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.randn(12, dtype=torch.float64))

    def forward(self, x):
        x = x.flatten(1)
        return self.a * x.square().sum(1) / 2 + x @ self.b


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randn(5, 3, 2, 2, dtype=torch.float64)


@pytest.mark.parametrize("target", [1.0, 2.5])
def test_penalty_and_its_parameter_gradients(images, target):
    real, fake = images
    model = Quadratic()
    torch.manual_seed(3)
    penalty = gradient_penalty(model, real, fake, target)
    penalty.backward()

    torch.manual_seed(3)
    mix = torch.rand(5, 1, 1, 1, dtype=torch.float64)
    x = (mix * real + (1 - mix) * fake).flatten(1)
    gradient = model.a.detach() * x + model.b.detach()
    norm = (gradient**2).sum(1).sqrt()
    torch.testing.assert_close(penalty, (((norm - target) / target) ** 2).mean())
    outer = 2 * (norm - target) / target**2 / norm / 5
    torch.testing.assert_close(model.a.grad, (outer * (gradient * x).sum(1)).sum())
    torch.testing.assert_close(model.b.grad, (outer[:, None] * gradient).sum(0))


def test_terms_of_wgan_gp(images):
    real, fake = images
    model = Quadratic()
    config = WGANGPConfig(gp_weight=3.0, drift=0.5)
    torch.manual_seed(3)
    terms = WGANGP(config).discriminator(model, real, fake)
    torch.manual_seed(3)
    penalty = gradient_penalty(model, real, fake)
    torch.testing.assert_close(terms["wasserstein"], model(fake).mean() - model(real).mean())
    torch.testing.assert_close(terms["penalty"], 3 * penalty)
    torch.testing.assert_close(terms["drift"], 0.5 * model(real).mean() ** 2)
    assert set(WGANGP(WGANGPConfig(gp_weight=0, drift=0)).discriminator(model, real, fake)) == {"wasserstein"}
    torch.testing.assert_close(WGANGP(config).generator(model, fake)["adversarial"], -model(fake).mean())


def test_penalty_where_the_gradient_vanishes():
    """A discriminator that ignores its input has penalty 1 and finite (zero) gradients."""
    model = Quadratic()
    with torch.no_grad():
        model.a.zero_()
        model.b.zero_()
    penalty = gradient_penalty(model, torch.zeros(2, 3, 2, 2).double(), torch.zeros(2, 3, 2, 2).double())
    penalty.backward()
    assert penalty == 1
    assert torch.isfinite(model.b.grad).all()


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_discriminator_gradients_through_the_fused_double_backward(tiny, norm):
    """All parameter gradients of the whole loss: the default backend against plain autograd, in float64."""
    torch.manual_seed(0)
    model = Discriminator(replace(tiny.discriminator, norm=norm)).double()
    for name, parameter in model.named_parameters():
        if "noise" in name or "rel_pos_bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    real, fake = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)

    def gradients(backend: str) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        with natten_ext.use_backend(backend):
            sum(WGANGP(WGANGPConfig()).discriminator(model, real, fake).values()).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    fused, expected = gradients("auto"), gradients("reference")
    assert fused.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(fused[name], gradient, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_penalty_gradient_is_a_true_second_derivative(tiny):
    """Directional derivative of the penalty along all parameters, against central differences."""
    torch.manual_seed(0)
    model = Discriminator(replace(tiny.discriminator, noise=False, augment=())).double()
    real, fake = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def penalty() -> torch.Tensor:
        torch.manual_seed(7)
        return gradient_penalty(model, real, fake)

    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=sign * 1e-6)
        values.append(penalty().detach())
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.sub_(d, alpha=sign * 1e-6)
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_errors():
    with pytest.raises(ValueError, match="one shape"):
        gradient_penalty(Quadratic(), torch.zeros(2, 3, 2, 2), torch.zeros(3, 3, 2, 2))
    with pytest.raises(ValueError, match="gp_target is 0"):
        WGANGPConfig(gp_target=0)
