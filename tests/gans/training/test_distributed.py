"""Several processes learn what one would: the same weights for the same global batch, penalties included."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gans.commands.cli import main
from gans.common.distributed import World, batch_mean, choose_device, join
from gans.training import logs
from gans.training.loop import synchronize_batch_norm
from gans.training.steps import local_parts
from tests.gans.processes import several

OPTIONS = """--preset digits --data digits --steps 3 --n-critic 2 --batch-d 8 --batch-g 4 --sample-count 4 --log-every 1
    --generator.base-dim 32 --generator.heads 2 --generator.noise --generator.windows 2 4 4
    --discriminator.patch-dims 8 8 --discriminator.heads 2 --discriminator.augment translation color cutout
    --loss.gp-weight 10 --loss.drift 1e-3 --loss.penalty-every 1 --loss.adversarial relativistic --loss.r1 1 --loss.r2 1
    --loss.bcr-real 1 --precision fp64 --lr-d 1e-3 --lr-g 1e-3
    --device cpu --threads 1"""
RECIPE = OPTIONS.split()


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    folder = out / "checkpoints" / "step-00000003"
    names = ("generator", "generator_ema", "discriminator")
    return {f"{n}.{key}": value for n in names for key, value in load_file(folder / f"{n}.safetensors").items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "penalties", [[], ["--loss.gp-weight", "0", "--loss.penalty-mode", "jvp"]], ids=["exact", "jvp"]
)
def test_two_processes_learn_what_one_does(tmp_path, penalties, monkeypatch):
    """WGAN-GP's penalty (of exact penalties), drift, R1, R2, bCR, DiffAug and noise at once.

    One process, against two, in a folder that they number, and one that continues for the last step.
    """
    monkeypatch.chdir(tmp_path)
    one, two = tmp_path / "one", tmp_path / "runs" / "00000-digits-digits"
    recipe = [*RECIPE, *penalties]
    assert main(["train", *recipe, "--out", str(one)]) == 0
    with several(2, "train", *recipe, "--steps", "2", errors=tmp_path) as processes:
        for process in processes:
            process.join(300)
            assert process.exitcode == 0, "".join((tmp_path / rank).read_text() for rank in "01")
    assert [json.loads((path / "config.json").read_text())["processes"] for path in two.parent.iterdir()] == [2]
    assert main(["train", *recipe, "--out", str(two), "--resume", "latest"]) == 0
    expected, found = final_weights(one), final_weights(two)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(logs.read(one), logs.read(two), strict=True):
        timing = {"images_per_second", "memory_mib"}
        assert {k: v for k, v in a.items() if k not in timing} == pytest.approx(
            {k: v for k, v in b.items() if k not in timing}, rel=1e-7
        )
    assert ("discriminator/penalty" in logs.read(one)[0]) == (not penalties)
    assert "discriminator/r2" in logs.read(one)[0]


def test_parts_cover_the_batch_once(tiny):
    config = replace(tiny, batch_d=24, accumulate=3)
    cpu = torch.device("cpu")
    parts = [part for rank in range(4) for part in local_parts(config, World(cpu, rank, 4), 24)]
    assert parts == [(i, i + 2) for i in range(0, 24, 2)]
    with pytest.raises(ValueError, match=r"batch_g is 6; it must be a multiple of accumulate \(3\) times .* \(4\)"):
        config.check_processes(4)


def test_alone(tmp_path):
    world = World(torch.device("cpu"))
    model = torch.nn.Linear(2, 1)
    model(torch.ones(3, 2)).sum().backward()
    before = model.weight.grad.clone()
    world.average_gradients(model)
    world.barrier()
    assert torch.equal(model.weight.grad, before)
    x = torch.randn(5, 2, requires_grad=True)
    torch.testing.assert_close(batch_mean(x), x.mean(0))
    assert batch_mean(x).requires_grad and not world.mean(x).requires_grad


def test_batch_norm_needs_gpus_for_several_processes():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    assert synchronize_batch_norm(model, World(torch.device("cpu"))) is model
    with pytest.raises(ValueError, match="Sequential has batch norms, which need GPUs to train in 2 processes"):
        synchronize_batch_norm(model, World(torch.device("cpu"), 0, 2))
    assert synchronize_batch_norm(model.eval(), World(torch.device("cpu"), 0, 2)) is model
    found = synchronize_batch_norm(model.train(), World(torch.device("cuda", 0), 0, 2))
    assert isinstance(found[0], torch.nn.SyncBatchNorm)


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="device is 'quantum', which torch cannot use here"):
        choose_device("quantum")


def test_a_world_size_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(ValueError, match="WORLD_SIZE must be a number of processes, got 'abc'"):
        join("cpu")
