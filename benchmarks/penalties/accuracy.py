"""How far the gradient of an R1 penalty in the weights is off: bias and scatter, by mode, step size and precision.

The truth is the gradient by double backward in float64. An estimate's own truth, along the direction that it drew, is
the one by forward mode in float64: what differs from that is error of the step size and of rounding, the rest is
the scatter of the direction. Images are in float32 throughout, so that all draw the same directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from gans.losses.penalties import PenaltyMode, zero_centered_penalty

SIGMAS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
PRECISIONS = ("fp32", "bf16")
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Accuracy:
    """All relative to the length of the true gradient.

    ``bias``: length of the mean error, the draws' own scatter taken out. ``error``: root mean square of the error along
    the drawn direction. ``scatter``: root mean square distance to the true gradient. ``cosine``: with it, mean.
    """

    mode: PenaltyMode | str
    sigma: float | None
    precision: str
    bias: float
    error: float
    scatter: float
    cosine: float


def weight_gradient(model: nn.Module, network: Network, images: Tensor, mode: PenaltyMode, sigma: float) -> Tensor:
    """The penalty's gradient in the model's weights, flat, in float64."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    penalty = zero_centered_penalty(network, images, mode, sigma)
    return torch.cat([g.flatten() for g in torch.autograd.grad(penalty, weights, materialize_grads=True)]).double()


class _Moments:
    """Sums over draws, of which Accuracy is made."""

    def __init__(self, truth: Tensor) -> None:
        self.truth, self.draws = truth, 0
        self.error = torch.zeros_like(truth)
        self.squares = self.distances = self.cosines = 0.0

    def add(self, found: Tensor, along: Tensor) -> None:
        error = found - along
        self.draws += 1
        self.error += error
        self.squares += float(error.square().sum())
        self.distances += float((found - self.truth).square().sum())
        self.cosines += float(torch.cosine_similarity(found, self.truth, dim=0))

    def accuracy(self, mode: str, sigma: float | None, precision: str) -> Accuracy:
        n, unit = self.draws, float(self.truth.square().sum())
        mean = float((self.error / n).square().sum())
        bias = (n * mean - self.squares / n) / (n - 1) if n > 1 else mean
        parts = (max(bias, 0.0), self.squares / n, self.distances / n)
        return Accuracy(mode, sigma, precision, *((part / unit) ** 0.5 for part in parts), self.cosines / n)  # type: ignore[arg-type]


def study(model: nn.Module, images: Tensor, draws: int, batches: Tensor) -> list[dict[str, object]]:
    """Of the R1 penalty at `images`, float32, with `draws` directions an image; first, for comparison, what other
    `batches` of images `(N, B, C, H, W)` do to the exact one.
    """
    exact_model = copy.deepcopy(model).double()

    def in_float64(x: Tensor) -> Tensor:
        return exact_model(x.double())

    def in_bf16(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return model(x)

    truth = weight_gradient(exact_model, in_float64, images, "exact", 0)
    of_batches = [weight_gradient(exact_model, in_float64, batch, "exact", 0) for batch in batches]
    mean = torch.stack(of_batches).mean(0)
    others = _Moments(mean)
    for gradient in of_batches:
        others.add(gradient, gradient)
    found = [others.accuracy("exact, other batches", None, "fp64")]

    networks = {"fp32": model, "bf16": in_bf16}
    cases: list[tuple[PenaltyMode, float | None, str]] = [("exact", None, name) for name in PRECISIONS]
    cases += [("jvp", None, "fp32")]
    cases += [("finite-difference", sigma, name) for name in PRECISIONS for sigma in SIGMAS]
    sums = {case: _Moments(truth) for case in cases}
    for draw in range(draws):

        def drawn(
            model: nn.Module, network: Network, mode: PenaltyMode, sigma: float | None, seed: int = draw
        ) -> Tensor:
            torch.manual_seed(seed)
            return weight_gradient(model, network, images, mode, sigma or 0)

        along = drawn(exact_model, in_float64, "jvp", None)
        for (mode, sigma, name), moments in sums.items():
            if mode == "exact" and draw:
                continue  # nothing is drawn
            moments.add(drawn(model, networks[name], mode, sigma), truth if mode == "exact" else along)
    found += [moments.accuracy(*case) for case, moments in sums.items()]
    return [asdict(accuracy) for accuracy in found]
