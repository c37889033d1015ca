"""One process of two: gradients of a gradient penalty under DDP and FSDP2 against those of the whole batch."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.ecosystem.test_torch import Network


class Penalized(nn.Module):
    """Score and gradient penalty in one forward, so that the wrapper sees one call and one backward."""

    def __init__(self):
        super().__init__()
        self.network = Network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        score = self.network(x).square().sum()
        (slope,) = torch.autograd.grad(score, x, create_graph=True)
        return (score + slope.square().sum()) / len(x)


def main(rendezvous: str) -> None:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    mesh = dist.init_device_mesh("cpu", (count,))
    for wrap in (DistributedDataParallel, lambda network: fully_shard(network, mesh=mesh)):
        torch.manual_seed(0)
        network = Penalized().double()
        batch = torch.randn(2 * count, 8, 8, 16, dtype=torch.float64)
        expected = torch.autograd.grad(network(batch), list(network.parameters()))
        network = wrap(network)
        network(batch[2 * rank : 2 * rank + 2]).backward()
        for parameter, right in zip(network.parameters(), expected, strict=True):
            gradient = parameter.grad
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            torch.testing.assert_close(gradient, right)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
