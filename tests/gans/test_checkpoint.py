"""A run killed at any moment leaves complete checkpoints only."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gans import checkpoint
from gans.config import to_dict
from gans.train import train


def save(root, step, keep=2, value=0.0):
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, value)
    state = {"step": step, "rng": checkpoint.rng_state()}
    return checkpoint.save(root, step, models={"model": model}, state=state, config={"a": 1}, keep=keep)


def test_round_trip_and_pruning(tmp_path):
    for step in (5, 10, 15, 100):
        save(tmp_path, step, value=step)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000015", "step-00000100"]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000015", "step-00000100"}
    newest = checkpoint.find("latest", tmp_path)
    model = torch.nn.Linear(2, 2)
    checkpoint.load_weights(newest, "model", model)
    assert (model.weight == 100).all()
    assert checkpoint.load_state(newest)["step"] == 100
    assert checkpoint.load_config(newest) == {"a": 1}


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, value=1)
    path = save(tmp_path, 5, value=2)
    model = torch.nn.Linear(2, 2)
    checkpoint.load_weights(path, "model", model)
    assert (model.weight == 2).all()


@pytest.mark.parametrize("moment", ["save_tensors", "torch.save", "write_text", "_flush", "os.replace"])
def test_killed_while_writing(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)
    owner, name = {
        "save_tensors": (checkpoint, "save_tensors"),
        "torch.save": (checkpoint.torch, "save"),
        "write_text": (type(tmp_path), "write_text"),
        "_flush": (checkpoint, "_flush"),
        "os.replace": (checkpoint.os, "replace"),
    }[moment]

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000001"]
    assert checkpoint.find("latest", tmp_path).name == "step-00000001"
    save(tmp_path, 2)  # what the dead run left is cleared away
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}


def test_find(tmp_path):
    assert checkpoint.find("latest", tmp_path / "nothing") is None
    with pytest.raises(FileNotFoundError, match="not a checkpoint folder"):
        checkpoint.find(str(tmp_path), tmp_path)


def test_rng_state_round_trip():
    state = checkpoint.rng_state()
    first = torch.rand(3)
    checkpoint.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


@pytest.mark.slow
def test_run_killed_with_sigkill_continues_to_the_same_weights(tiny, tiny_run, tmp_path):
    """Every step writes a checkpoint, so the signal falls into one with a good chance; none is left broken."""
    config = replace(tiny, steps=300)
    out = tmp_path / "killed"
    run = replace(tiny_run, out=str(out), checkpoint_every=1, keep=2, sample_every=1000, threads=1)
    script = (
        "import json, sys; from gans.config import *; from gans.train import train; "
        "recipe, run = json.load(sys.stdin); "
        "train(from_dict(TrainConfig, recipe), from_dict(RunConfig, run), progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps([to_dict(config), to_dict(run)]))
    process.stdin.close()
    root = out / "checkpoints"
    deadline = time.monotonic() + 300
    while len(checkpoint.list_checkpoints(root)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for path in checkpoint.list_checkpoints(root):
        assert checkpoint.load_state(path)["step"] == int(path.name.removeprefix("step-"))
        assert all(load_file(path / f"{name}.safetensors") for name in ("generator", "generator_ema", "discriminator"))

    last = checkpoint.load_state(checkpoint.find("latest", root))["step"]
    config = replace(config, steps=last + 2)
    resumed = train(config, replace(run, resume="latest"), progress=False)
    whole = train(config, replace(run, out=str(tmp_path / "whole"), checkpoint_every=10_000), progress=False)
    assert resumed.name == whole.name
    for name in ("generator", "generator_ema", "discriminator"):
        a, b = (load_file(path / f"{name}.safetensors") for path in (resumed, whole))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("limit", [1000, 100_000])
def test_disk_that_is_full(tmp_path, limit):
    """No file may grow beyond `limit` bytes: too little for the weights, or for the optimisers' state only."""
    save(tmp_path, 1)
    model = torch.nn.Linear(60, 60)
    state = {"step": 2, "optimizer": torch.zeros(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # Python ignores the signal, writes fail
    try:
        with pytest.raises(OSError, match=r"cannot write checkpoint .*step-00000002.* Last good .*step-00000001"):
            checkpoint.save(tmp_path, 2, models={"model": model}, state=state, config={}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.save(tmp_path, 2, models={"model": model}, state=state, config={}, keep=2)


def test_no_space_left(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        OSError, match=r"No space left on device \(\d+ MiB free\). Last good checkpoint: none"
    ) as caught:
        save(tmp_path, 1)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_unreadable_files_are_named(tmp_path, damage):
    path = save(tmp_path, 1)

    def break_file(name: str) -> None:
        file = path / name
        content = file.read_bytes()
        file.unlink()
        if damage != "missing":
            file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"no checkpoint")

    break_file("model.safetensors")
    with pytest.raises(ValueError, match=r"cannot load .*step-00000001/model\.safetensors"):
        checkpoint.load_weights(path, "model", torch.nn.Linear(2, 2))
    break_file("state.pt")
    with pytest.raises(ValueError, match=r"cannot read .*step-00000001/state\.pt"):
        checkpoint.load_state(path)
    break_file("config.json")
    with pytest.raises(ValueError, match=r"cannot read .*step-00000001/config\.json"):
        checkpoint.load_config(path)


def test_weights_of_another_model_are_refused(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(ValueError, match="size mismatch for weight"):
        checkpoint.load_weights(path, "model", torch.nn.Linear(3, 2))
