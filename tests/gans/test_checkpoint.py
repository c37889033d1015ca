"""A run killed at any moment leaves complete checkpoints only."""

from __future__ import annotations

import pytest
import torch

from gans import checkpoint


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


@pytest.mark.parametrize("moment", ["save_file", "torch.save", "write_text", "_flush", "os.replace"])
def test_killed_while_writing(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)
    owner, name = {
        "save_file": (checkpoint, "save_file"),
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
