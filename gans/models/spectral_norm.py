"""PyTorch's Linear, Conv2d and ConvTranspose2d with spectral normalisation, for networks that have it everywhere.

Source: "Spectral Normalization for GANs", Miyato et al. 2018, arXiv 1802.05957: the weight, as a matrix with one row
per output channel, divided by an estimate of its largest singular value. The estimate moves by one step of power
iteration in `begin_step`, which the trainer calls once per update; `torch.nn.utils.spectral_norm` moves it in every
forward pass, so that two passes of one update disagree and cannot be repeated. `gans.models.equalized` has ViTGAN's
improved form for equalised linear maps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INITIAL_STEPS = 15
"""Steps of power iteration at initialisation, as in `torch.nn.utils.parametrizations.spectral_norm`."""


def begin_step(model: nn.Module) -> None:
    """Moves what a network changes once per update of it, such as the power iteration of a spectral norm."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "begin_step"):
                module.begin_step()


class _Spectral(nn.Module):
    """The weight of a layer over its spectral norm; the vectors are constants to derivatives."""

    weight: Tensor
    left_vector: Tensor
    right_vector: Tensor

    output_axis = 0
    """Axis of the weight that counts output channels."""

    def add_vectors(self) -> None:
        """Called once the weight is there."""
        rows, columns = self._matrix().shape
        self.register_buffer("left_vector", F.normalize(torch.randn(rows), dim=0))
        self.register_buffer("right_vector", F.normalize(torch.randn(columns), dim=0))
        for _ in range(0 if self.weight.is_meta else INITIAL_STEPS):
            self.begin_step()

    @torch.no_grad()
    def begin_step(self) -> None:
        """One step of power iteration."""
        matrix = self._matrix()
        self.right_vector.copy_(F.normalize(matrix.t() @ self.left_vector, dim=0, eps=1e-12))
        self.left_vector.copy_(F.normalize(matrix @ self.right_vector, dim=0, eps=1e-12))

    def normalized_weight(self) -> Tensor:
        """The weight over the estimate `u^T W v` of its largest singular value."""
        with torch.autocast(self.weight.device.type, enabled=False):
            sigma = torch.dot(self.left_vector, self._matrix() @ self.right_vector)
        return self.weight / sigma

    def _matrix(self) -> Tensor:
        return self.weight.transpose(0, self.output_axis).flatten(1)


class SpectralDense(_Spectral, nn.Linear):
    """`nn.Linear` with spectral normalisation; arguments of `nn.Linear`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.add_vectors()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalized_weight(), self.bias)


class SpectralConv2d(_Spectral, nn.Conv2d):
    """`nn.Conv2d` with spectral normalisation; arguments of `nn.Conv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.add_vectors()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalized_weight(), self.bias, self.stride, self.padding)


class SpectralConvTranspose2d(_Spectral, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with spectral normalisation; arguments of `nn.ConvTranspose2d`."""

    output_axis = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.add_vectors()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv_transpose2d(x, self.normalized_weight(), self.bias, self.stride, self.padding)
