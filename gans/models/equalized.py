"""Linear maps with equalised learning rate and improved spectral normalisation.

Sources: equalised learning rate, "Progressive Growing of GANs", Karras et al. 2017, arXiv 1710.10196, section 4.1;
spectral normalisation, Miyato et al. 2018, arXiv 1802.05957; its improved form, "ViTGAN", Lee et al. 2021,
arXiv 2107.04589, section 3.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SpectralName = Literal["none", "standard", "improved"]


class EqualizedLinear(nn.Module):
    """`x W^T + b` over the last axis, with W = `weight * scale` and b = `bias * lr_multiplier`.

    `weight` starts from N(0, 1) / lr_multiplier and `scale` makes W start from N(0, gain^2 / in_features), so that an
    optimiser with a fixed step size changes all layers at the same relative speed. With `equalized=False` the
    weight itself has W's size and the scale is 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        bias_init: float = 0.0,
        equalized: bool = True,
        lr_multiplier: float = 1.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.lr_multiplier = lr_multiplier
        deviation = gain * in_features**-0.5
        self.scale = lr_multiplier * deviation if equalized else 1.0
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * (deviation / self.scale))
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_multiplier)) if bias else None

    def effective_weight(self) -> Tensor:
        """W, `(out_features, in_features)`."""
        return self.weight * self.scale

    def effective_bias(self) -> Tensor | None:
        """b, `(out_features,)`."""
        return None if self.bias is None else self.bias * self.lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.effective_bias())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, scale={self.scale:.3g}"


class SpectralLinear(EqualizedLinear):
    """An `EqualizedLinear` whose W is divided by an estimate of its largest singular value sigma(W).

    "improved" multiplies it by sigma at initialisation again: `sigma(W_init) W / sigma(W)`, ViTGAN's answer to
    transformers being slow to learn with a Lipschitz constant of 1; "standard" does not.

    The estimate is `u^T W v` with singular vectors that are exact at initialisation and move by one step of power
    iteration in `begin_step`, which the trainer calls once per update: passes within an update agree, gradients of
    gradients see u and v as constants. u, v and sigma(W_init) are buffers, so checkpoints hold them.
    """

    left_vector: Tensor
    right_vector: Tensor
    initial_sigma: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, norm: SpectralName = "improved", **options: float
    ) -> None:
        if norm not in ("standard", "improved"):
            raise ValueError(f"norm must be 'standard' or 'improved', got {norm!r}")
        super().__init__(in_features, out_features, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            weight = super().effective_weight()
            # The smaller of the two Gram matrices has the singular vector as its last eigenvector.
            wide = weight.double() if in_features <= out_features else weight.double().t()
            short = torch.linalg.eigh(wide.t() @ wide).eigenvectors[:, -1]
            long = F.normalize(wide @ short, dim=0)
            left, right = (long, short) if in_features <= out_features else (short, long)
        self.register_buffer("left_vector", left.to(weight.dtype))
        self.register_buffer("right_vector", right.to(weight.dtype))
        sigma = self.sigma().detach() if norm == "improved" else torch.ones((), device=weight.device)
        self.register_buffer("initial_sigma", sigma)

    def sigma(self) -> Tensor:
        """The estimate of W's largest singular value, a scalar with a graph to the weight."""
        # Elementwise, because autocast would round a matrix product.
        return (self.left_vector[:, None] * super().effective_weight() * self.right_vector).sum()

    def effective_weight(self) -> Tensor:
        return super().effective_weight() * (self.initial_sigma / self.sigma())

    @torch.no_grad()
    def begin_step(self) -> None:
        """One step of power iteration."""
        weight = super().effective_weight()
        self.right_vector.copy_(F.normalize(weight.t() @ self.left_vector, dim=0))
        self.left_vector.copy_(F.normalize(weight @ self.right_vector, dim=0))


def make_linear(
    in_features: int,
    out_features: int,
    *,
    spectral: SpectralName = "none",
    bias: bool = True,
    equalized: bool = True,
    gain: float = 1.0,
) -> EqualizedLinear:
    """An `EqualizedLinear`, or a `SpectralLinear` of the given kind."""
    if spectral == "none":
        return EqualizedLinear(in_features, out_features, bias=bias, equalized=equalized, gain=gain)
    return SpectralLinear(in_features, out_features, norm=spectral, bias=bias, equalized=equalized, gain=gain)
