"""A run killed at any moment leaves complete checkpoints only."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gans.recipes.config import RunConfig, TrainConfig
from gans.training import checkpoint
from gans.training.loop import train
from tests.gans.processes import FORKS


def save(root, step, keep=2, value=0.0, best=False):
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, value)
    state = {"step": step, "rng": checkpoint.rng_state()}
    return checkpoint.save(root, step, models={"model": model}, state=state, config={"a": 1}, keep=keep, best=best)


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


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_killed_while_replacing(tmp_path, monkeypatch, best, killed_at):
    """Between any two names that folders get: the next start finds the one before or the new one, whole."""
    path = save(tmp_path, 1, value=1, best=best)
    calls = itertools.count(1)

    def die(source, target, replace=os.replace):
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, value=2, best=best)
    checkpoint.remove_leftovers(tmp_path)
    assert names(tmp_path) == {path.name}
    load_all(path)
    model = torch.nn.Linear(2, 2)
    checkpoint.load_weights(path, "model", model)
    assert (model.weight == (2 if killed_at == 3 else 1)).all()


def test_a_link_that_leads_nowhere_is_replaced(tmp_path):
    """Of a user who moved the folder elsewhere, and it is gone."""
    (tmp_path / checkpoint.BEST).symlink_to(tmp_path / "gone")
    assert checkpoint.holds_run(tmp_path)
    load_all(save(tmp_path, 1, best=True))
    assert names(tmp_path) == {checkpoint.BEST}


def test_find(tmp_path):
    assert checkpoint.find("latest", tmp_path / "nothing") is None
    with pytest.raises(FileNotFoundError, match="not a checkpoint folder"):
        checkpoint.find(str(tmp_path), tmp_path)


def test_rng_state_round_trip():
    state = checkpoint.rng_state()
    first = torch.rand(3)
    checkpoint.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


def run_train(config: TrainConfig, run: RunConfig) -> None:
    train(config, run, progress=False)


@pytest.mark.slow
def test_run_killed_with_sigkill_continues_to_the_same_weights(tiny, tiny_run, tmp_path):
    """Every step writes a checkpoint, so the signal falls into one with a good chance; none is left broken.

    While it lives no other run may have its folder; killed, it has no time to give the lock back.
    """
    config = replace(tiny, steps=300)
    out = tmp_path / "killed"
    run = replace(tiny_run, out=str(out), checkpoint_every=1, keep=2, sample_every=1000, threads=1)
    process = FORKS.Process(target=run_train, args=(config, run))
    process.start()
    root = out / "checkpoints"
    deadline = time.monotonic() + 300
    while len(checkpoint.list_checkpoints(root)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    before = (out / "config.json").read_bytes()
    for resume in (None, "latest"):
        message = rf"out .* is in use by process {process.pid} on \S+, started 2\d+-"
        with pytest.raises(FileExistsError, match=message):
            train(config, replace(run, resume=resume), progress=False)
    assert (out / "config.json").read_bytes() == before
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
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
        with pytest.raises(OSError, match=r"cannot write .*step-00000002.* Last good .*step-00000001"):
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
        OSError, match=r"No space left on device \(\d+ MiB free\)\..*Last good checkpoint: none"
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
    with pytest.raises(ValueError, match=r"cannot read .*step-00000001/model\.safetensors"):
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


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_only_the_runs_own_names_are_touched(tmp_path):
    """Copies, notes and folders that begin as checkpoints do are neither deleted nor resumed from."""
    first = save(tmp_path, 1)
    theirs = ["step-00000001-best", "step-old", "step-1", "step-000000002", ".partial-mine", ".partial-old-step-1", "z"]
    for name in theirs:
        shutil.copytree(first, tmp_path / name)
    (tmp_path / "step-00000099").write_text("a file")
    (tmp_path / ".partial-7").mkdir()  # what a killed run leaves
    (tmp_path / ".partial-old-step-00000001").mkdir()
    for step in (2, 99_999_999, 100_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == {*theirs, "step-00000099", "step-99999999", "step-100000000"}
    assert checkpoint.find("latest", tmp_path).name == "step-100000000"
    assert checkpoint.load_state(tmp_path / "step-00000001-best")["step"] == 1


def test_what_a_killed_run_left_is_removed_by_the_next_start(tiny, tiny_run):
    """Before the first checkpoint is due; what others have called alike stays."""
    out = Path(tiny_run.out)
    train(replace(tiny, steps=2), tiny_run, progress=False)
    leftovers = [".partial-config.json", ".partial-report.html", "samples/.partial-step-00000002.png"]
    for name in leftovers:
        (out / name).write_text("half")
    theirs = [".partial-thesis.txt", "samples/.partial-mine.png", "checkpoints/.partial-mine"]
    for name in theirs:
        (out / name).touch()
    (out / "checkpoints" / ".partial-4").mkdir()
    (out / "checkpoints" / ".partial-old-best").symlink_to(out / "samples")
    train(replace(tiny, steps=2), replace(tiny_run, resume="latest"), progress=False)
    found = {path.relative_to(out).as_posix() for path in out.rglob(".partial-*")}
    assert found == set(theirs)
    assert (out / "samples" / "real.png").exists()


def test_a_link_to_a_checkpoint_elsewhere_is_removed_and_not_followed(tmp_path):
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    save(root, 1).rename(elsewhere)
    (root / "step-00000001").symlink_to(elsewhere)
    save(root, 2)
    save(root, 3)
    assert names(root) == {"step-00000002", "step-00000003"}
    assert checkpoint.load_state(elsewhere)["step"] == 1


def flip_bit(file: Path, where: float, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


def load_all(path: Path) -> None:
    checkpoint.load_config(path)
    checkpoint.load_state(path)
    checkpoint.load_weights(path, "model", torch.nn.Linear(2, 2))


@pytest.mark.parametrize("where", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "config.json", "SHA256SUMS"])
def test_a_flipped_bit_is_found(tmp_path, name, where):
    good = save(tmp_path, 1)
    path = save(tmp_path, 2)
    load_all(path)
    flip_bit(path / name, where)
    found = r"\S+" if name == "SHA256SUMS" else name
    with pytest.raises(checkpoint.DamagedError, match=rf"cannot read {path}/{found}: .*Last good checkpoint: {good}\."):
        load_all(path)
    load_all(good)


def test_the_last_good_checkpoint_is_one_that_is_good(tmp_path):
    good, flipped, torn, newest = (save(tmp_path, step, keep=4) for step in (1, 2, 3, 4))
    flip_bit(flipped / "state.pt", 0.5)
    (torn / "model.safetensors").unlink()
    (newest / "state.pt").unlink()
    with pytest.raises(checkpoint.DamagedError, match=rf"Last good checkpoint: {good}\. Move {newest} away"):
        checkpoint.load_state(newest)
    (good / "config.json").unlink()
    with pytest.raises(checkpoint.DamagedError, match=r"No other checkpoint in .* is good"):
        checkpoint.load_state(newest)


def test_checksums_are_those_of_sha256sum(tmp_path):
    path = save(tmp_path, 1)
    ran = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.split() == [
        "config.json:",
        "OK",
        "model.safetensors:",
        "OK",
        "state.pt:",
        "OK",
    ]
    (path / "SHA256SUMS").unlink()  # as before there were any
    load_all(path)


def test_resuming_from_a_damaged_checkpoint(tiny, tiny_run):
    """Refused with the way on, which works and gives the weights of the whole run."""
    whole = train(tiny, replace(tiny_run, out=tiny_run.out + "-whole"), progress=False)
    damaged = train(replace(tiny, steps=4), tiny_run, progress=False)
    flip_bit(damaged / "discriminator.safetensors", 0.7)
    resume = replace(tiny_run, resume="latest")
    with pytest.raises(
        ValueError, match=r"step-00000004/discriminator\.safetensors: .*Last good .*step-00000002\. Move"
    ):
        train(tiny, resume, progress=False)
    damaged.rename(damaged.with_name("step-00000004-damaged"))
    resumed = train(tiny, resume, progress=False)
    for file in whole.glob("*.safetensors"):
        a, b = load_file(file), load_file(resumed / file.name)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_copy_beside_the_checkpoints_can_be_named_and_does_not_pass_for_the_newest(tiny, tiny_run):
    newest = train(replace(tiny, steps=4), tiny_run, progress=False)
    older = newest.with_name("step-00000002")
    shutil.copytree(older, copy := newest.with_name("zz-best"))
    with pytest.raises(ValueError, match=r"cannot resume .*zz-best: .* has later checkpoints \(step-00000004\)"):
        train(tiny, replace(tiny_run, resume=str(copy)), progress=False)
    shutil.rmtree(newest)
    shutil.rmtree(older)
    assert train(tiny, replace(tiny_run, resume=str(copy)), progress=False).name == "step-00000006"
    assert copy.exists()
