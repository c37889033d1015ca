from __future__ import annotations

import copy

import pytest
import torch

from gans.models.equalized import EqualizedLinear, SpectralLinear, make_linear


def largest(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(weight.detach(), 2)


@pytest.mark.parametrize("equalized", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(40, 24), (24, 40)])
def test_improved_norm_keeps_the_initial_sigma(rows, columns, equalized):
    torch.manual_seed(0)
    linear = SpectralLinear(columns, rows, equalized=equalized, gain=0.7).double()
    unnormed = (linear.weight * linear.scale).detach()
    torch.testing.assert_close(linear.effective_weight().detach(), unnormed, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(linear.initial_sigma, largest(unnormed), rtol=1e-6, atol=0)
    with torch.no_grad():
        linear.weight.mul_(3).add_(torch.randn_like(linear.weight), alpha=2 * float(linear.weight.detach().std()))
    for _ in range(300):
        linear.begin_step()
    weight = (linear.weight * linear.scale).detach()
    torch.testing.assert_close(linear.sigma().detach(), largest(weight), rtol=1e-5, atol=0)
    expected = linear.initial_sigma * weight / largest(weight)
    torch.testing.assert_close(linear.effective_weight().detach(), expected, rtol=1e-5, atol=1e-8)
    x = torch.randn(3, columns, dtype=torch.float64)
    torch.testing.assert_close(linear(x).detach(), x @ expected.t(), rtol=1e-4, atol=1e-6)


def test_standard_norm_has_sigma_one():
    linear = SpectralLinear(8, 5, norm="standard")
    torch.testing.assert_close(largest(linear.effective_weight()), torch.tensor(1.0))
    assert linear.initial_sigma == 1


def test_gradient_takes_the_vectors_as_constants():
    """d(sigma_0 w / (u^T w v)) against autograd with u and v given."""
    torch.manual_seed(0)
    linear = SpectralLinear(6, 4, bias=False).double()
    with torch.no_grad():
        linear.weight.add_(torch.randn_like(linear.weight))
    u, v, sigma = linear.left_vector.clone(), linear.right_vector.clone(), linear.initial_sigma.clone()

    def weight(w):
        return sigma * w / (u @ w @ v)

    cotangent = torch.randn(4, 6, dtype=torch.float64)
    (actual,) = torch.autograd.grad((linear.effective_weight() * cotangent).sum(), linear.weight)
    w = (linear.weight * linear.scale).detach().requires_grad_(True)
    (expected,) = torch.autograd.grad((weight(w) * cotangent).sum(), w)
    torch.testing.assert_close(actual, expected * linear.scale)


def test_forward_moves_nothing_and_begin_step_does():
    linear = SpectralLinear(6, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(4, 6))
    before = copy.deepcopy(linear.state_dict())
    linear(torch.randn(2, 6)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())
    linear.begin_step()
    assert not torch.equal(linear.left_vector, before["left_vector"])
    assert not torch.equal(linear.right_vector, before["right_vector"])
    assert torch.equal(linear.initial_sigma, before["initial_sigma"])


def train(linear: SpectralLinear, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        linear.begin_step()
        optimizer.zero_grad()
        linear(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()


def test_saved_and_restored_it_continues_identically():
    torch.manual_seed(0)
    linear = SpectralLinear(6, 4)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.1, betas=(0.0, 0.99))
    train(linear, optimizer, range(5))
    saved = copy.deepcopy((linear.state_dict(), optimizer.state_dict()))
    train(linear, optimizer, range(5, 9))

    torch.manual_seed(1)
    other = SpectralLinear(6, 4)  # other weights, other initial sigma
    other.load_state_dict(saved[0])
    other_optimizer = torch.optim.Adam(other.parameters(), lr=0.1, betas=(0.0, 0.99))
    other_optimizer.load_state_dict(saved[1])
    train(other, other_optimizer, range(5, 9))
    for name, value in linear.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert torch.equal(linear.effective_weight(), other.effective_weight())


def test_equalised_learning_rate():
    torch.manual_seed(0)
    linear = EqualizedLinear(400, 300, lr_multiplier=0.01, bias_init=1.0)
    assert abs(float(linear.weight.detach().std()) - 100) < 1
    assert abs(float(linear.effective_weight().detach().std()) - 400**-0.5) < 1e-3
    assert torch.equal(linear.effective_bias(), torch.ones(300))
    plain = EqualizedLinear(400, 300, equalized=False, gain=2.0)
    assert plain.scale == 1 and abs(float(plain.weight.detach().std()) - 0.1) < 2e-3
    x = torch.randn(2, 400)
    expected = x @ linear.effective_weight().t() + 1
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-5)


def test_kinds():
    assert type(make_linear(3, 2)) is EqualizedLinear
    assert type(make_linear(3, 2, spectral="improved")) is SpectralLinear
    with pytest.raises(ValueError, match="norm must be"):
        make_linear(3, 2, spectral="weight")
