"""What a run says, the best checkpoint, weights to start from, wandb, numbered folders, grids with gaps."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from gans.commands import train as command
from gans.commands.cli import main
from gans.commands.train import new_folder, next_folder
from gans.data.images import grid, to_uint8
from gans.evaluation.metrics import distances
from gans.evaluation.plots import read_tiles
from gans.recipes.config import RunConfig
from gans.recipes.named import preset
from gans.training import checkpoint, monitor
from gans.training.logs import read
from gans.training.loop import train
from gans.training.status import duration


def test_durations():
    shown = [duration(seconds) for seconds in (0.4, 59.7, 187, 3 * 3600 + 120, 50 * 3600)]
    assert shown == ["0s", "1m 00s", "3m 07s", "3h 02m", "2d 02h"]


class Distances:
    """A metric that gives these distances, one after the other."""

    name, count, floor = "scripted", 4, 0.5

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, images):
        return self.values.pop(0)


def test_banner_and_one_line_a_tick(tiny, tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(monitor, "make_metric", lambda choice, real: Distances(9.0, 4.0, 6.0, 3.0))
    train(tiny, replace(tiny_run, metric_every=2, metric_images=4, log_every=2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "scripted: real against real (two halves of 4 images) 0.5"
    data, networks, parameters, device, steps, writes = lines[1:7]
    assert data == "data        digits: 1,797 images, at 8x8x1" and networks == "networks    transgan against transgan"
    assert re.fullmatch(r"parameters  generator [\d,]+, generator_ema [\d,]+, discriminator [\d,]+", parameters)
    assert device.startswith("device      cpu, ") and steps == "steps       0 to 6, batches of 4 and 6"
    assert writes.endswith("checkpoints/ every 2 (3 kept), distance (random) every 2")
    ticks = lines[7:]
    assert [line.split()[1] for line in ticks] == ["0", "1", "2", "3"]  # the first is that of the first step
    numbers = r"kimg [\d.]+ +time \w+ +s/kimg [\d.e+]+ +MiB \d+ +D -?[\d.]+ +G -?[\d.]+"
    pattern = rf"tick \d +{numbers} +distance (\S+)( \(best\))? +left \w+"
    found = [re.fullmatch(pattern, line) for line in ticks]
    assert [(m[1], bool(m[2])) for m in found] == [("9", False), ("4", True), ("6", False), ("3", True)]
    assert ticks[0].split()[3] == "0.0" and ticks[-1].endswith("left 0s")


def test_the_best_checkpoint_is_kept(tiny, tiny_run, monkeypatch):
    scripts = iter([Distances(9.0, 4.0, 6.0), Distances(5.0, 3.5), Distances(7.0)])
    monkeypatch.setattr(monitor, "make_metric", lambda choice, real: next(scripts))
    run = replace(tiny_run, metric_every=2, metric_images=4, keep=1)
    root = Path(run.out) / "checkpoints"
    train(replace(tiny, steps=4), run, progress=False)
    assert checkpoint.load_state(root / "best")["step"] == 2
    assert [path.name for path in checkpoint.list_checkpoints(root)] == ["step-00000004"]
    train(replace(tiny, steps=8), replace(run, resume="latest"), progress=False)  # 4.0 was the best before
    assert checkpoint.load_state(root / "best")["step"] == 8
    arguments = ["sample", "--checkpoint", str(root / "best"), "--seeds", "0", "--out", str(root / "x.png")]
    assert main(arguments) == 0
    (root / f"{checkpoint.PARTIAL}old-best").mkdir()  # what a killed process leaves
    train(replace(tiny, steps=10), replace(run, resume="latest"), progress=False)
    assert not list(root.glob(".partial-*")) and checkpoint.load_state(root / "best")["step"] == 8


def test_the_best_checkpoint_goes_by_one_metric(tiny, tiny_run, monkeypatch):
    other = Distances(300.0, 400.0)
    other.floor = 20.0  # of another network, or number of images
    scripts = iter([Distances(9.0, 4.0), other])
    monkeypatch.setattr(monitor, "make_metric", lambda choice, real: next(scripts))
    run = replace(tiny_run, metric_every=2, metric_images=4)
    out = Path(run.out)
    train(replace(tiny, steps=2), run, progress=False)
    train(replace(tiny, steps=6), replace(run, resume="latest"), progress=False)
    assert checkpoint.load_state(out / "checkpoints" / "best")["step"] == 4
    assert "300 at step 4" in (out / "report.html").read_text()
    lines = read(out)
    assert [line["distance"] for line in distances(lines)] == [300.0, 400.0]
    assert [line["distance"] for line in distances(lines, 0.5)] == [9.0, 4.0]
    assert distances(lines, 1.0) == distances([]) == []


@pytest.mark.parametrize("name", [checkpoint.BEST, f"{checkpoint.REPLACED}{checkpoint.BEST}"])
def test_a_run_with_only_a_best_checkpoint_is_not_begun_again(tiny, tiny_run, name):
    best = Path(tiny_run.out) / "checkpoints" / name
    best.mkdir(parents=True)  # what is there of a run that was killed before its first regular checkpoint
    with pytest.raises(FileExistsError, match="holds a run"):
        train(tiny, tiny_run, progress=False)


def test_grids_have_gaps_and_are_read_with_or_without():
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    picture = grid(images, gap=2)
    assert picture.size == (3 * 10 - 2, 2 * 10 - 2)
    array = np.asarray(picture)
    assert (array[:, 8:10] == 255).all() and (array[8:10] == 255).all()


@pytest.mark.parametrize(("count", "size"), [(5, 8), (1, 8), (25, 8), (4, 16)])
@pytest.mark.parametrize("gap", [0, 2])
def test_tiles_of_a_grid(tmp_path, count, size, gap):
    images = torch.rand(count, 3, size, size) * 1.9 - 1
    grid(images, gap=gap).save(tmp_path / "grid.png")
    tiles = read_tiles(tmp_path / "grid.png", size)
    assert len(tiles) >= count
    assert all(np.array_equal(tile, expected) for tile, expected in zip(tiles, to_uint8(images), strict=False))


def test_wandb_listens_to_tensorboard(tiny, tiny_run, monkeypatch):
    calls = []
    fake = ModuleType("wandb")
    fake.init = lambda **options: calls.append(options) or fake
    fake.finish = lambda exit_code: calls.append(exit_code)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(replace(tiny, steps=1), replace(tiny_run, wandb="gans"), progress=False)
    options, code = calls
    assert options["project"] == "gans" and options["sync_tensorboard"] and options["name"] == "run" and code == 0
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is 'gans', which needs the package wandb: pip install wandb"):
        train(tiny, replace(tiny_run, wandb="gans", out=tiny_run.out + "2"), progress=False)


def test_runs_without_a_name_are_numbered(tmp_path):
    run = RunConfig(data="some/images.tar.gz", out="")
    assert next_folder(tmp_path, "cifar10", run).name == "00000-cifar10-images"
    (tmp_path / "00041-x-y").mkdir()
    (tmp_path / "notes").mkdir()
    assert next_folder(tmp_path, "cifar10", replace(run, data="digits")).name == "00042-cifar10-digits"
    with pytest.raises(ValueError, match="resume is 'latest'; say with out which run"):
        next_folder(tmp_path, "cifar10", replace(run, resume="latest"))


@pytest.mark.parametrize("other", ["00000-cifar10-digits", "00000-stl10-images"])
def test_two_runs_at_one_moment_have_numbers_of_their_own(tmp_path, monkeypatch, other):
    """The other run makes its folder between the choice of this one and the making of it."""
    root, run = tmp_path / "runs", RunConfig(data="digits", out="")

    def overtaken(*arguments):
        monkeypatch.undo()
        chosen = next_folder(*arguments)
        (root / other).mkdir(parents=True)
        return chosen

    monkeypatch.setattr(command, "next_folder", overtaken)
    with new_folder(root, "cifar10", run) as folder:
        assert folder == root / "00001-cifar10-digits" and folder.is_dir()
    assert [path.name for path in root.iterdir()] == [other]  # what has stayed empty is gone


def test_transfer_names_what_fits_and_what_does_not(tiny, tiny_run, tmp_path, capsys):
    first = train(tiny, tiny_run, progress=False)
    capsys.readouterr()
    deeper = replace(tiny, generator=replace(tiny.generator, latent_dim=7, depths=(2, 1)), steps=0)
    second = replace(tiny_run, out=str(tmp_path / "second"), init=tiny_run.out)
    last = train(deeper, second)
    said = capsys.readouterr().out
    assert re.search(r"generator from \S+step-00000006/generator: \d+ of \d+ tensors; not loaded: input.weight "
                     r"\(\(512, 6\) there, \(512, 7\) here\), stages.0.1.\S+", said)  # fmt: skip
    assert re.search(r"\ndiscriminator from \S+/discriminator: (\d+) of \1 tensors\n", said)
    assert json.loads((last / "config.json").read_text())["init"][0].startswith("generator from")
    for name in ("generator", "generator_ema", "discriminator"):
        before, after = (checkpoint.load_tensors(path, name) for path in (first, last))
        same = [key for key in after if key in before and before[key].shape == after[key].shape]
        assert same and all(torch.equal(before[key], after[key]) for key in same)
    with pytest.raises(FileNotFoundError, match=r"init is .*nowhere.*, which holds no weights"):
        train(tiny, replace(second, out=str(tmp_path / "third"), init="nowhere"), progress=False)


def test_init_beside_resume(tiny, tiny_run, tmp_path, capsys):
    """One command for the first start and the others: weights come from `init` where there is no checkpoint yet."""
    other = train(replace(tiny, steps=0, seed=1), replace(tiny_run, out=str(tmp_path / "other")), progress=False)
    both = replace(tiny_run, init=str(other), resume="latest")
    first = train(replace(tiny, steps=0), both, progress=False)
    before, after = (checkpoint.load_tensors(path, "generator") for path in (other, first))
    assert all(torch.equal(before[key], after[key]) for key in before)
    said = f"init {str(other)!r} is not used: the run goes on from {first}\n"
    assert said not in capsys.readouterr().out
    train(replace(tiny, steps=1), both, progress=False)
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"init is '.*' and resume is '.*': a run that goes on .* give one of the two"):
        train(tiny, replace(both, resume=str(first)), progress=False)


def test_transfer_from_another_network_is_refused(tiny, tiny_run, tmp_path, capsys):
    """A few names and shapes agree by chance; that is no transfer."""
    train(replace(tiny, steps=0), tiny_run, progress=False)
    vitgan = preset("vitgan32-small").discriminator
    other = replace(tiny, discriminator=replace(vitgan, image_size=8, channels=1, augment=()), steps=0)
    second = replace(tiny_run, out=str(tmp_path / "second"), init=tiny_run.out)
    message = r"init is .*run', of which (0|[1-4])\.\d% of the discriminator's numbers come, less than 5%: "
    with pytest.raises(ValueError, match=message):
        train(other, second, progress=False)
    last = train(other, replace(second, init_little=True), progress=False)
    assert "discriminator from" in json.loads((last / "config.json").read_text())["init"][2]
    wider = replace(tiny, generator=replace(tiny.generator, base_dim=64), steps=0)
    with pytest.raises(ValueError, match=r"% of the generator's numbers come.*With --init-little it starts"):
        train(wider, replace(second, out=str(tmp_path / "third")), progress=False)


def test_sample_with_gaps(tiny, tiny_run, tmp_path):
    train(replace(tiny, steps=1), tiny_run, progress=False)
    arguments = ["sample", "--checkpoint", tiny_run.out, "--seeds", "0-3", "--out", str(tmp_path / "x.png")]
    assert main([*arguments, "--gap", "3"]) == 0
    assert Image.open(tmp_path / "x.png").size == (19, 19)
