"""What may change where a run goes on: it takes effect, and stands in the log."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gans.losses.adversarial import LossConfig
from gans.losses.path_length import PathLengthLossConfig
from gans.recipes.config import TrainConfig, to_dict
from gans.training import checkpoint
from gans.training.dry_run import check_files
from gans.training.loop import train
from gans.training.resume import CHANGEABLE, FREE
from gans.training.steps import NonFiniteError


def weights(path: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(path / f"{name}.safetensors")


def starts(out: str) -> list[dict]:
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" in line]


def test_a_lower_learning_rate_takes_effect_and_stands_in_the_log(tiny, tiny_run, capsys):
    """At a rate of 0 the weights stay; the other network learns on."""
    before = train(replace(tiny, steps=2), tiny_run, progress=False)
    after = train(replace(tiny, lr_d=0.0), replace(tiny_run, resume="latest", threads=1, log_every=3), progress=False)
    for name, stays in (("discriminator", True), ("generator", False)):
        a, b = weights(before, name), weights(after, name)
        assert all(torch.equal(a[key], b[key]) for key in a) is stays
    fresh, resumed = starts(tiny_run.out)
    assert (fresh["step"], fresh["checkpoint"], fresh["changed"]) == (0, None, {})
    assert (resumed["step"], resumed["checkpoint"]) == (2, str(before))
    changed = {"steps": "2 -> 6", "lr_d": "0.001 -> 0.0", "threads": "0 -> 1", "log_every": "2 -> 3"}
    assert resumed["changed"] == changed
    assert "from step 2 on with another recipe: lr_d (0.001 -> 0.0)\n" in capsys.readouterr().out
    saved = checkpoint.load_config(after)
    assert saved["recipe"]["lr_d"] == 0.0 and json.loads((Path(tiny_run.out) / "config.json").read_text()) == saved


def test_the_advice_after_a_nan_works(tiny, tiny_run):
    """A run that diverges goes on, from the checkpoint that is named, by what the message tells to try."""
    wild = replace(tiny, lr_d=1e30, lr_g=1e30, warmup=0)
    train(replace(tiny, steps=2), tiny_run, progress=False)
    resume = replace(tiny_run, resume="latest", checkpoint_every=100)
    advice = (
        r"step-00000002; --resume latest goes on from it\. Try a lower learning rate \(--lr-d, --lr-g\), --precision"
    )
    with pytest.raises(NonFiniteError, match=advice):
        train(wild, resume, progress=False)
    calm = replace(tiny, lr_d=1e-4, lr_g=1e-4, clip=1.0, precision="fp32")
    assert train(calm, resume, progress=False).name == "step-00000006"
    assert [start["step"] for start in starts(tiny_run.out)] == [0, 2, 2]


def test_advice_where_there_is_no_checkpoint(tiny, tiny_run):
    with pytest.raises(NonFiniteError, match=r"checkpoint: none; --resume latest starts afresh\. Try a lower"):
        train(replace(tiny, lr_d=1e30), replace(tiny_run, checkpoint_every=100), progress=False)


OTHERS = {
    "precision": {"precision": "bf16", "penalty_precision": "same"},
    "double": {"precision": "fp64"},
    "rates": {"lr_d": 1e-5, "lr_g": 1e-5, "warmup": 10, "decay_start": 3, "decay_end": 5, "decay_to": 0.1, "clip": 1.0},
}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_other_fields(tiny, tiny_run, fields):
    train(replace(tiny, steps=2), tiny_run, progress=False)
    after = train(replace(tiny, **fields), replace(tiny_run, resume="latest"), progress=False)
    assert set(starts(tiny_run.out)[1]["changed"]) == {"steps", *fields}
    kinds = {value.dtype for value in weights(after, "generator").values() if value.is_floating_point()}
    assert kinds == {torch.float64 if fields.get("precision") == "fp64" else torch.float32}


def test_loss_weights_and_average(tiny, tiny_run):
    train(replace(tiny, steps=2), tiny_run, progress=False)
    loss = replace(tiny.loss, gp_weight=0.0, drift=0.0, r1=2.0, r2=1.0, bcr_real=1.0, penalty_every=2)
    recipe = replace(tiny, loss=loss, ema=replace(tiny.ema, decay=0.0), steps=3)
    after = train(recipe, replace(tiny_run, resume="latest"), progress=False)
    current, average = weights(after, "generator"), weights(after, "generator_ema")
    assert all(torch.equal(current[key], average[key]) for key in current)
    line = json.loads((Path(tiny_run.out) / "log.jsonl").read_text().splitlines()[-1])
    assert {"discriminator/r1", "discriminator/r2", "discriminator/bcr"} <= line.keys()
    assert "discriminator/penalty" not in line


def test_what_changes_the_networks_or_the_draws_is_refused(tiny, tiny_run):
    train(replace(tiny, steps=2), tiny_run, progress=False)
    resume = replace(tiny_run, resume="latest")
    for name, change in {
        "seed": {"seed": 1},
        "n_critic": {"n_critic": 3},
        "batch_d": {"batch_d": 8},
        r"images\.flip": {"images": replace(tiny.images, flip=False)},
        r"generator\.noise": {"generator": replace(tiny.generator, noise=False)},
        r"loss\.adversarial": {"loss": replace(tiny.loss, adversarial="hinge")},
        "betas_g": {"betas_g": (0.5, 0.9)},
    }.items():
        with pytest.raises(ValueError, match=rf"cannot resume .* with another recipe; it differs in {name} \(.*\)$"):
            train(replace(tiny, lr_d=1e-5, **change), resume, progress=False)
    assert len(starts(tiny_run.out)) == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_nothing_left_to_do_in_another_folder_is_refused(tiny, tiny_run, tmp_path, steps):
    """Before anything is written; in its own folder a run that is complete may be started again."""
    path = train(replace(tiny, steps=2), tiny_run, progress=False)
    done, new = replace(tiny, steps=steps), replace(tiny_run, resume=str(path), out=str(tmp_path / "new"))
    message = rf"cannot resume .*step-00000002 in another out: it is at step 2, and steps is {steps}$"
    for start in (check_files, partial(train, progress=False)):
        with pytest.raises(ValueError, match=message):
            start(done, new)
        assert not Path(new.out).exists()
    for resume in ("latest", str(path)):
        assert train(done, replace(tiny_run, resume=resume), progress=False) == path
    assert train(replace(tiny, steps=3), new, progress=False).name == "step-00000003"


def names(values: dict, prefix: str = "") -> set[str]:
    nested = [names(value, f"{prefix}{name}.") for name, value in values.items() if isinstance(value, dict)]
    return {prefix + name for name in values}.union(*nested)


def test_the_fields_that_may_change_exist():
    fields = names(to_dict(replace(TrainConfig(), loss=LossConfig()))) | names(to_dict(PathLengthLossConfig()), "loss.")
    assert fields >= CHANGEABLE | FREE
