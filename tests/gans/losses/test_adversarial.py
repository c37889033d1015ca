"""Losses and penalties against formulas written out here, and through whole discriminators, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import natten_ext
from gans.losses.adversarial import ADVERSARIAL, GANLoss, Loss, LossConfig
from gans.losses.penalties import consistency, drift, gradient_penalty, zero_centered_penalty
from gans.models.transgan import Discriminator

PENALTIES_OFF = {"gp_weight": 0.0, "drift": 0.0}
RECIPES = {
    "wgan-gp with epsilon": LossConfig(),
    "non-saturating with R1": LossConfig(adversarial="nonsaturating", r1=2.0, **PENALTIES_OFF),
    "relativistic with R1 and R2": LossConfig(adversarial="relativistic", r1=2.0, r2=0.5, **PENALTIES_OFF),
    "hinge with bCR": LossConfig(adversarial="hinge", bcr_real=10, bcr_fake=5, **PENALTIES_OFF),
    "lazy R1 and two augmented views": LossConfig(
        adversarial="nonsaturating",
        r1=1.0,
        penalty_every=2,
        bcr_real=1,
        bcr_fake=1,
        bcr_against="augmented",
        **PENALTIES_OFF,
    ),
}


class Quadratic(torch.nn.Module):
    """D(x) = a |x|^2 / 2 + b . x: its gradient a x + b, and that gradient's derivatives, are known."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.randn(12, dtype=torch.float64))

    def forward(self, x, augment=True):
        x = x.flatten(1)
        if augment:
            x = x + 0.25
        return self.a * x.square().sum(1) / 2 + x @ self.b


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randn(5, 3, 2, 2, dtype=torch.float64)


@pytest.mark.parametrize("target", [1.0, 2.5])
def test_gradient_penalty_and_its_parameter_gradients(images, target):
    real, fake = images
    model = Quadratic()
    torch.manual_seed(3)
    penalty = gradient_penalty(model, real, fake, target)
    penalty.backward()

    torch.manual_seed(3)
    mix = torch.rand(5, 1, 1, 1, dtype=torch.float64)
    x = (mix * real + (1 - mix) * fake).flatten(1) + 0.25
    gradient = model.a.detach() * x + model.b.detach()
    norm = (gradient**2).sum(1).sqrt()
    torch.testing.assert_close(penalty, (((norm - target) / target) ** 2).mean())
    outer = 2 * (norm - target) / target**2 / norm / 5
    torch.testing.assert_close(model.a.grad, (outer * (gradient * x).sum(1)).sum())
    torch.testing.assert_close(model.b.grad, (outer[:, None] * gradient).sum(0))


def test_zero_centered_penalty_and_its_parameter_gradients(images):
    real, _ = images
    model = Quadratic()
    penalty = zero_centered_penalty(model, real)
    penalty.backward()
    x = real.flatten(1) + 0.25
    gradient = model.a.detach() * x + model.b.detach()
    torch.testing.assert_close(penalty, gradient.square().sum(1).mean())
    torch.testing.assert_close(model.a.grad, 2 * (gradient * x).sum(1).mean())
    torch.testing.assert_close(model.b.grad, 2 * gradient.mean(0))
    assert real.grad is None and not real.requires_grad


class Patches(torch.nn.Module):
    """Several logits an image, each a `Quadratic` of it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.each = torch.nn.ModuleList(Quadratic() for _ in range(count))

    def forward(self, x, augment=True):
        return torch.stack([quadratic(x, augment) for quadratic in self.each], dim=1)


def test_penalties_on_several_logits_are_those_on_their_mean(images):
    """As the adversarial losses have it; the drift term keeps each logit near 0, not only their mean."""
    real, fake = images
    model = Patches(4)

    def mean(x):
        return model(x).mean(1)

    assert model(real).shape == (5, 4)
    for several, one in ((model, mean), (model.each[0], model.each[0])):
        torch.manual_seed(3)
        penalty = gradient_penalty(several, real, fake)
        torch.manual_seed(3)
        torch.testing.assert_close(penalty, gradient_penalty(one, real, fake))
        torch.testing.assert_close(zero_centered_penalty(several, real), zero_centered_penalty(one, real))
    column = model.each[0](real)[:, None]
    torch.testing.assert_close(drift(column), drift(column[:, 0]))
    torch.testing.assert_close(drift(torch.cat([column, -column], dim=1)), drift(column[:, 0]))


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


def test_consistency_compares_augmented_with_clean_or_augmented(images):
    real, _ = images
    model = Quadratic()
    logits = model(real)
    torch.testing.assert_close(consistency(model, real, logits), (logits - model(real, augment=False)).square().mean())
    assert consistency(model, real, logits, clean=False) == 0  # this discriminator augments without chance
    assert consistency(model, real, logits) > 0


def test_adversarial_terms_by_formula():
    torch.manual_seed(0)
    real, fake = torch.randn(2, 7, dtype=torch.float64)

    def softplus(x):
        return torch.log1p(torch.exp(x))

    expected = {
        "wasserstein": (fake.mean() - real.mean(), -fake.mean()),
        "nonsaturating": ((softplus(-real) + softplus(fake)).mean(), softplus(-fake).mean()),
        "relativistic": (softplus(fake - real).mean(), softplus(real - fake).mean()),
        "hinge": (((1 - real).clamp(min=0) + (1 + fake).clamp(min=0)).mean(), -fake.mean()),
    }
    assert expected.keys() == ADVERSARIAL.keys()
    for name, (for_d, for_g) in expected.items():
        discriminator_term, generator_term = ADVERSARIAL[name]
        torch.testing.assert_close(discriminator_term(real, fake), for_d)
        torch.testing.assert_close(generator_term(fake, real), for_g)
    torch.testing.assert_close(drift(real), real.mean() ** 2)


def test_terms_have_their_weights(images):
    real, fake = images
    model = Quadratic()
    config = LossConfig(gp_weight=3, gp_target=2, drift=0.5, r1=0.2, r2=0.4, bcr_real=7, bcr_fake=9)
    loss = GANLoss(config)
    terms = loss.discriminator(model, real, fake)
    assert set(terms) == {"adversarial", "drift", "bcr"}
    torch.testing.assert_close(terms["adversarial"], model(fake).mean() - model(real).mean())
    torch.testing.assert_close(terms["drift"], 0.5 * drift(model(real)))
    bcr = 7 * consistency(model, real, model(real)) + 9 * consistency(model, fake, model(fake))
    torch.testing.assert_close(terms["bcr"], bcr)

    torch.manual_seed(3)
    penalties = loss.discriminator_penalty(model, real, fake, step=5)
    torch.manual_seed(3)
    torch.testing.assert_close(penalties["penalty"], 3 * gradient_penalty(model, real, fake, 2))
    torch.testing.assert_close(penalties["r1"], 0.1 * zero_centered_penalty(model, real))
    torch.testing.assert_close(penalties["r2"], 0.2 * zero_centered_penalty(model, fake))
    assert set(penalties) == {"penalty", "r1", "r2"}

    ranged = GANLoss(LossConfig(out_of_range=5, **PENALTIES_OFF)).generator(model, None, 3 * fake)
    excess = torch.where(fake.abs() > 1 / 3, (3 * fake.abs() - 1) ** 2, 0).mean()
    torch.testing.assert_close(ranged["out_of_range"], 5 * excess)
    torch.testing.assert_close(ranged["adversarial"], -model(3 * fake).mean())

    bare = GANLoss(LossConfig(**PENALTIES_OFF))
    assert set(bare.discriminator(model, real, fake)) == {"adversarial"}
    assert bare.discriminator_penalty(model, real, fake, step=0) == {}
    assert bare.generator_penalty(model, real, step=0) == {}
    assert not bare.uses_real and GANLoss(RECIPES["relativistic with R1 and R2"]).uses_real


def test_lazy_penalties_keep_their_mean_weight(images):
    real, fake = images
    model = Quadratic()
    loss = GANLoss(LossConfig(adversarial="nonsaturating", r1=2.0, penalty_every=4, **PENALTIES_OFF))
    by_step = [loss.discriminator_penalty(model, real, fake, step=step) for step in range(8)]
    assert [bool(terms) for terms in by_step] == [True, False, False, False] * 2
    mean = sum(sum(terms.values(), torch.zeros(())) for terms in by_step) / 8
    torch.testing.assert_close(mean, zero_centered_penalty(model, real))


def total(loss: Loss, model, real, fake) -> torch.Tensor:
    terms = loss.discriminator(model, real, fake) | loss.discriminator_penalty(model, real, fake, step=0)
    return torch.stack(list(terms.values())).sum()


def gradients(loss: Loss, model, real, fake, backend: str) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with natten_ext.use_backend(backend):
        total(loss, model, real, fake).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameter_gradients_through_the_fused_double_backward(tiny, recipe):
    """Every parameter gradient of the whole loss: the default backend against naive attention."""
    torch.manual_seed(0)
    norm = "rms" if "R2" in recipe else "layer"
    model = Discriminator(replace(tiny.discriminator, norm=norm)).double()
    for name, parameter in model.named_parameters():
        if "noise" in name or "rel_pos_bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    real, fake = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)
    loss = GANLoss(RECIPES[recipe])
    fused, expected = (gradients(loss, model, real, fake, backend) for backend in ("auto", "reference"))
    assert fused.keys() == expected.keys()
    for name in expected:
        # The relativistic loss and its penalties do not see what is added to all scores alike, and neither does the
        # hinge loss where all of them lie within the margins.
        if name == "head.bias" and recipe.startswith(("relativistic", "hinge")):
            continue
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(
            fused[name], expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert len(expected) == len(list(model.parameters()))


@pytest.mark.parametrize("recipe", ["wgan-gp with epsilon", "relativistic with R1 and R2"])
def test_gradient_of_a_penalty_is_a_true_second_derivative(tiny, recipe):
    """Directional derivative of the whole loss along all parameters, against central differences."""
    torch.manual_seed(0)
    model = Discriminator(replace(tiny.discriminator, noise=False, augment=())).double()
    real, fake = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    loss = GANLoss(RECIPES[recipe])

    def value() -> torch.Tensor:
        torch.manual_seed(7)
        return total(loss, model, real, fake)

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(value(), parameters), direction, strict=True))
    values = []
    for shift in (1e-6, -2e-6):  # to +1e-6, then on to -1e-6
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=shift)
        values.append(value().detach())
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_generator_terms_reach_the_fake_images_only(tiny):
    torch.manual_seed(0)
    model = Discriminator(replace(tiny.discriminator, augment=())).double()
    real, fake = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    fake.requires_grad_(True)
    for recipe in RECIPES.values():
        loss = GANLoss(recipe)
        terms = loss.generator(model, real if loss.uses_real else None, fake)
        (gradient,) = torch.autograd.grad(terms["adversarial"], fake)
        assert gradient.abs().max() > 0


def test_errors(images):
    real, fake = images
    with pytest.raises(ValueError, match="one shape"):
        gradient_penalty(Quadratic(), real, fake[:3])
    with pytest.raises(ValueError, match="one shape"):
        GANLoss(LossConfig()).discriminator(Quadratic(), real, fake[:3])
    with pytest.raises(ValueError, match="needs real images"):
        GANLoss(RECIPES["relativistic with R1 and R2"]).generator(Quadratic(), None, fake)
    for change, message in [
        ({"gp_target": 0}, "gp_target is 0"),
        ({"penalty_every": 0}, "penalty_every is 0"),
        ({"r1": -1.0}, "r1 is -1"),
        ({"adversarial": "lsgan"}, "adversarial is 'lsgan'"),
        ({"bcr_against": "real"}, "bcr_against is 'real'"),
    ]:
        with pytest.raises(ValueError, match=message):
            LossConfig(**change)
