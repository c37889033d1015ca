"""R1 and R2 by finite differences and by forward mode, against double backward in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gans.common import rng
from gans.common.forward_mode import directional_derivative
from gans.losses.adversarial import GANLoss, LossConfig
from gans.losses.penalties import zero_centered_penalty
from gans.models.augment import AUGMENTATIONS, diff_augment
from gans.models.projected import ProjectedDiscriminatorConfig
from gans.models.stylenat_discriminator import StyleNATDiscriminatorConfig
from gans.models.transgan import DiscriminatorConfig
from gans.models.vitgan import ViTDiscriminatorConfig
from gans.recipes.registry import build

TRANSGAN = DiscriminatorConfig(
    patch_dims=(12, 4), depths=(1, 1), windows=(4, 2), heads=2, augment=("translation", "color")
)
VITGAN = ViTDiscriminatorConfig(dim=12, depth=1, heads=3, augment=("translation", "color"))
DISCRIMINATORS = {
    "transgan, layer norm": TRANSGAN,
    "transgan, rms norm": replace(TRANSGAN, norm="rms"),
    "vitgan, l2 and improved spectral norm": VITGAN,
    "vitgan, dot products": replace(VITGAN, score="dot", tied=False, values="plain"),
    "stylenat": StyleNATDiscriminatorConfig(image_size=32, width=128, max_dim=16, group=2),
    "projected": ProjectedDiscriminatorConfig(
        image_size=32, features="random", feature_size=128, width=4, pixel_width=4, augment=("translation", "color")
    ),
}  # fmt: skip


class Cubic(nn.Module):
    """D(x) = tanh(W x) . a, and a cube, whose derivatives of all orders matter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 12, dtype=torch.float64) / 4)
        self.a = nn.Parameter(torch.randn(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1) @ self.w.T
        return torch.tanh(h) @ self.a + h.pow(3).mean(1) / 3


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, 2, 2, dtype=torch.float64) / 2


def seeded(function, *arguments) -> Tensor:
    torch.manual_seed(7)
    return function(*arguments)


def by_hand(model: nn.Module, images: Tensor) -> Tensor:
    """The penalty along the direction that "jvp" draws, by double backward."""
    torch.manual_seed(7)
    direction = torch.randn_like(images)
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).reshape(len(images), -1).mean(1).sum(), images, create_graph=True)
    slopes = (gradient * direction).flatten(1).sum(1)
    together = model.scored_together(len(images)) if hasattr(model, "scored_together") else 1
    return slopes.unflatten(0, (-1, together)).sum(1).square().mean() / together


def parameter_gradients(model: nn.Module, penalty: Tensor) -> dict[str, Tensor]:
    """Zero for parameters that do not matter."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(penalty, named.values(), materialize_grads=True), strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """To a share of the largest gradient of all, since some are zero but for rounding."""
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 0
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * scale, name


class Normed(Cubic):
    """A `Cubic` whose images share statistics, four by four."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, 4))
        return super().forward((x / x.std(1, keepdim=True)).flatten(0, 1))

    def scored_together(self, batch: int) -> int:
        return 4


@pytest.mark.parametrize("network", [Cubic, Normed])
def test_the_expectation_over_directions_is_the_exact_penalty(images, network, monkeypatch):
    """Of a quadratic form of a normal vector, as the estimate is, it is the trace: the sum over unit vectors."""
    model, x = network(), torch.cat([images, images.flip(0) ** 2])
    directions = iter(torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape))
    monkeypatch.setattr(rng, "randn", lambda *shape, **options: next(directions))
    found = sum(zero_centered_penalty(model, x, "jvp") for _ in range(x.numel()))
    expected = zero_centered_penalty(model, x)
    torch.testing.assert_close(found, expected)
    assert_same(parameter_gradients(model, found), parameter_gradients(model, expected), 1e-12)


def test_the_mean_over_many_directions_is_the_exact_penalty(images):
    """Within four standard errors."""
    model, draws = Cubic(), 600
    exact = zero_centered_penalty(model, images).item()
    for mode in ("jvp", "finite-difference"):
        torch.manual_seed(3)
        values = torch.stack([zero_centered_penalty(model, images, mode, 1e-4).detach() for _ in range(draws)])
        error = values.std().item() / draws**0.5
        assert abs(values.mean().item() - exact) <= 4 * error < 0.2 * exact, mode


def test_the_expectation_of_finite_differences_is_off_by_sigma_squared(images):
    """Over v and -v together, the term of order sigma cancels: a tenth of sigma has a hundredth of the bias."""
    model = Cubic()
    direction = torch.randn_like(images)

    def both(sigma: float) -> Tensor:
        slopes = [(model(images + s * direction) - model(images)) / s for s in (sigma, -sigma)]
        return torch.stack(slopes).square().mean()

    true = directional_derivative(model, images, direction).square().mean()
    coarse, fine = (float((both(sigma) - true).detach()) for sigma in (1e-2, 1e-3))
    assert coarse / fine == pytest.approx(100, rel=0.05)


def test_finite_differences_tend_to_the_directional_derivative(images):
    """With the same direction, in proportion to sigma, through random augmentation too."""

    class Augmented(Cubic):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(diff_augment(x, ("color", "flip", "cutout")) + torch.rand(()))

    for model in (Cubic(), Augmented()):
        true = seeded(zero_centered_penalty, model, images, "jvp")
        gradients = parameter_gradients(model, true)
        for sigma in (1e-3, 1e-5):
            found = seeded(zero_centered_penalty, model, images, "finite-difference", sigma)
            assert found.item() == pytest.approx(true.item(), rel=20 * sigma)
            assert_same(parameter_gradients(model, found), gradients, 50 * sigma)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_through_every_discriminator(name):
    """Values and all parameter gradients of both estimates, against double backward along the same direction."""
    torch.manual_seed(0)
    model = build(DISCRIMINATORS[name]).double()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter_name.endswith(("bias", "strength", "norm.weight")):
            nn.init.normal_(parameter, 0.5, 0.3)
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64) * 2 - 1
    expected = by_hand(model, x)
    gradients = parameter_gradients(model, expected)
    for mode, tolerance in (("jvp", 1e-11), ("finite-difference", 1e-3)):
        found = seeded(zero_centered_penalty, model, x, mode, 1e-6)
        assert found.item() == pytest.approx(expected.item(), rel=tolerance)
        assert_same(parameter_gradients(model, found), gradients, tolerance)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_which_images_are_scored_together(name):
    torch.manual_seed(0)
    model = build(DISCRIMINATORS[name]).double()
    x = (torch.rand(6, 3, 32, 32, dtype=torch.float64) * 2 - 1).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).reshape(6, -1).mean(1)[0], x)
    together = model.scored_together(6) if hasattr(model, "scored_together") else 1
    assert together == {"stylenat": 2, "projected": 6}.get(name, 1)
    assert [bool(g.any()) for g in gradient] == [i < together for i in range(6)]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_forward_mode_through_every_augmentation(name):
    torch.manual_seed(0)
    x, v = torch.randn(2, 4, 3, 48, 48, dtype=torch.float64)
    weight = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    tangent = seeded(directional_derivative, lambda x: AUGMENTATIONS[name](weight * x), x, v)
    torch.testing.assert_close(
        tangent, (seeded(AUGMENTATIONS[name], 1.3 * (x + v)) - seeded(AUGMENTATIONS[name], 1.3 * x))
    )
    (slope,) = torch.autograd.grad(tangent.square().sum(), weight)  # of weight^2 times a constant
    torch.testing.assert_close(slope, 2 * tangent.square().sum().detach() / 1.3)


def test_norms_that_pytorch_differentiates_wrongly():
    """The gradient of a Jacobian-vector product, against double backward; PyTorch's own is off by half."""
    torch.manual_seed(0)
    x, v, p, c = torch.randn(4, 6, 5, 3, dtype=torch.float64)
    p.requires_grad_()
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    mean, variance = torch.randn(5).double(), torch.rand(5).double() + 0.5
    norms = {
        "layer": lambda x: F.layer_norm(x, (3,), w[:3], w[2:], 0.1),
        "batch": lambda x: F.batch_norm(x, None, None, w, w, training=True),
        "batch, evaluation": lambda x: F.batch_norm(x, mean, variance, w, w),
        "group": lambda x: F.group_norm(x, 1, w, w),
        "rms": lambda x: F.rms_norm(x, (3,), w[:3]),
    }
    for name, norm in norms.items():
        along = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((norm(along * p).sin() * c).sum(), along, create_graph=True)
        expected = torch.autograd.grad((gradient * v).sum(), (p, w))
        function = lambda x, norm=norm: (norm(x * p).sin() * c).sum()  # noqa: E731
        found = torch.autograd.grad(directional_derivative(function, x, v), (p, w))
        torch.testing.assert_close(found, expected, msg=lambda m, name=name: f"{name}: {m}")
    for norm in (F.instance_norm, lambda x: torch.layer_norm(x, (3,))):
        with pytest.raises(NotImplementedError, match=r"forward mode through \w+_norm: .* loss\.penalty_mode"):
            directional_derivative(norm, x, v)


def test_batch_statistics_move_once():
    model = nn.BatchNorm1d(3, momentum=0.5)
    x = torch.randn(8, 3)
    directional_derivative(model, x, torch.randn(8, 3))
    torch.testing.assert_close(model.running_mean, x.mean(0) / 2)


def test_a_result_without_the_input():
    with pytest.raises(ValueError, match="does not depend on x"):
        directional_derivative(lambda x: torch.ones(3), torch.zeros(3), torch.ones(3))


def test_weights_and_lazy_regularisation_in_every_mode(images):
    model = Cubic()
    fake = images.flip(0)
    for mode in ("exact", "finite-difference", "jvp"):
        config = LossConfig(gp_weight=0, r1=0.2, r2=0.4, penalty_every=3, penalty_mode=mode, penalty_sigma=0.05)
        loss = GANLoss(config)
        torch.manual_seed(4)
        terms = loss.discriminator_penalty(model, images, fake, step=3)
        torch.manual_seed(4)
        torch.testing.assert_close(terms["r1"], 0.3 * zero_centered_penalty(model, images, mode, 0.05))
        torch.testing.assert_close(terms["r2"], 0.6 * zero_centered_penalty(model, fake, mode, 0.05))
        assert loss.discriminator_penalty(model, images, fake, step=4) == {}
    with pytest.raises(ValueError, match="mode must be 'exact', 'finite-difference' or 'jvp', got 'fast'"):
        zero_centered_penalty(model, images, "fast")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"penalty_mode": "fast", "gp_weight": 0}, r"loss\.penalty_mode is 'fast'; it must be one of exact, fin"),
        ({"penalty_mode": "jvp"}, r"loss\.penalty_mode is 'jvp', .* make loss\.gp_weight \(now 10\.0\) 0, or"),
        ({"penalty_mode": "finite-difference", "r1": 1}, r"loss\.penalty_mode is 'finite-difference', which estimates"),
        ({"penalty_sigma": 0.0}, r"loss\.penalty_sigma is 0\.0; it must be positive"),
        ({"penalty_sigma": -1.0}, r"loss\.penalty_sigma is -1\.0; it must be positive"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)
