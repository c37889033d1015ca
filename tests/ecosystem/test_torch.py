"""What torch builds around a model works with the fused operators: export, ahead-of-time compilation, checkpoints,
offloaded activations, data parallelism."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import natten_ext
from tests.samples import TEST_ALL

ROOT = Path(__file__).resolve().parents[2]


class Network(nn.Module):
    """Every kind of attention, on maps ``(batch, 8, 8, 16)``."""

    def __init__(self):
        super().__init__()
        self.neighborhood = natten_ext.NeighborhoodAttention(16, 4, kernel_size=[3, 5], dilation=[2, 1])
        self.grid = natten_ext.GridAttention(16, 2, window_size=4)
        self.full = natten_ext.L2Attention(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.grid(self.neighborhood(x))
        return self.full(x.flatten(1, 2)).sum(-1)


def gradients(network: nn.Module, x: torch.Tensor, call: Callable | None = None) -> list[torch.Tensor]:
    """Of the parameters, of a loss with a gradient penalty; ``call`` stands for a call of the network."""
    x = x.clone().requires_grad_()
    score = (call or network)(x).square().mean()
    (slope,) = torch.autograd.grad(score, x, create_graph=True)
    return list(torch.autograd.grad(score + slope.square().sum(), list(network.parameters())))


@pytest.fixture
def network() -> Network:
    return Network().double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 8, 8, 16, dtype=torch.float64)


def exported(network: nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    """For a batch of any size."""
    return torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))


def test_export(network, x, tmp_path):
    """A program goes through a file and gives the same."""
    program = exported(network, x)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "natten_ext_cpu.forward.default" in targets
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    larger = torch.randn(5, 8, 8, 16, dtype=torch.float64)
    torch.testing.assert_close(loaded(larger), network(larger))


# In a process that only loads programs.
ELSEWHERE = """
import sys, torch
if "import" in sys.argv:
    import natten_ext
folder, larger = sys.argv[1], torch.load(sys.argv[1] + "/larger.pt")
exported = torch.export.load(folder + "/exported.pt2").module()
compiled = torch._inductor.aoti_load_package(folder + "/compiled.pt2")
for program in (exported, compiled):
    torch.testing.assert_close(program(larger["x"]), larger["y"])
print("the same")
"""


@pytest.mark.slow
@pytest.mark.skipif(not TEST_ALL, reason="takes minutes; NATTEN_EXT_TEST_ALL=1 runs it")
def test_programs_compiled_ahead_of_time(network, x, tmp_path):
    """By AOTInductor. A process that loads such a program, or an exported one, needs the import."""
    torch.export.save(exported(network, x), tmp_path / "exported.pt2")
    torch._inductor.aoti_compile_and_package(exported(network, x), package_path=str(tmp_path / "compiled.pt2"))
    larger = torch.randn(5, 8, 8, 16, dtype=torch.float64)
    torch.save({"x": larger, "y": network(larger).detach()}, tmp_path / "larger.pt")
    with_, without = (
        subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path, *words], cwd=ROOT, capture_output=True, text=True)
        for words in (["import"], [])
    )
    assert with_.stdout == "the same\n", with_.stderr
    assert "natten_ext_cpu" in without.stderr


def test_checkpoint(network, x):
    """Activations computed again in the backward pass, to the second derivative."""
    expected = gradients(network, x)
    torch.testing.assert_close(gradients(network, x, lambda x: checkpoint(network, x, use_reentrant=False)), expected)


def test_offloaded_activations(network, x):
    """What autograd saves may go elsewhere until it is needed; it has no entry for every query and key."""
    expected = gradients(network, x)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradients(network, x), expected)
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.testing.assert_close(gradients(network, x), expected)
    queries = [t for t in saved if t.shape == (2, 8, 8, 4, 4)]
    assert queries, "the operators' operands do not pass the hooks"
    assert max(t.numel() for t in saved) <= 3 * x.numel()


@pytest.mark.slow
def test_data_parallel(tmp_path):
    """Two processes, half of the batch each, have the gradients of the whole batch, under DDP and under FSDP2."""
    command = [sys.executable, "-m", "tests.ecosystem.data_parallel", tmp_path / "rendezvous"]
    environment = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank)}, **pipes) for rank in range(2)
    ]
    for process in processes:
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
