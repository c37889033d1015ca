"""Conditional training from end to end: labels of the data, checkpoints, resuming, `sample --class`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gans.commands.cli import main
from gans.commands.train import conditional, parse
from gans.data.arrays import ArrayImages
from gans.data.loading import Stream
from gans.data.sources import open_source
from gans.training import logs, monitor
from gans.training.loop import train


@pytest.fixture
def classes(tiny):
    return conditional(tiny, "digits")


def test_labels_come_with_their_images():
    """Image i is all i, and its label i % 3, also where a broken one is left out."""
    images = np.arange(12, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    source = ArrayImages(images, [i % 3 for i in range(12)], ["a", "b", "c"])
    stream = Stream(source, size=4, channels=1, seed=0, flip=True, labels=source.labels)
    for position in range(30):
        image, label = stream[position]
        assert int(image[0, 0, 0]) % 3 == label
    stream._unreadable.add(5)
    assert all(
        int(image[0, 0, 0]) % 3 == label and int(image[0, 0, 0]) != 5
        for image, label in map(stream.__getitem__, range(12))
    )


def test_train_resume_and_sample(classes, tiny_run, tmp_path, capsys):
    assert classes.generator.classes == classes.discriminator.classes == 10
    classes = replace(classes, steps=4)
    run = replace(tiny_run, metric_every=3, metric_images=20)
    whole = train(classes, run, progress=False)
    assert json.loads((whole / "config.json").read_text())["classes"] == [str(i) for i in range(10)]
    assert logs.read(Path(run.out))[-2]["real_images"] == 4 * (2 * 4 + 6)  # the generator's labels are of real images

    parts = replace(tiny_run, out=str(tmp_path / "parts"))
    train(replace(classes, steps=2), parts, progress=False)
    resumed = train(classes, replace(parts, resume="latest"), progress=False)
    for name in ("generator", "discriminator"):
        one, two = (load_file(path / f"{name}.safetensors") for path in (whole, resumed))
        assert all(torch.equal(one[key], two[key]) for key in one)

    def sample(name, *options):
        out = tmp_path / f"{name}.png"
        status = main(
            ["sample", "--checkpoint", run.out, "--seeds", "3,13,4", "--out", str(out), "--columns", "3", *options]
        )
        return (
            np.asarray(Image.open(out)).reshape(8, 3, 8).swapaxes(0, 1) if status == 0 else None
        ), capsys.readouterr().err

    (by_seed, _), (threes, _) = sample("seeds"), sample("threes", "--class", "3")
    assert np.array_equal(by_seed[0], threes[0]) and np.array_equal(by_seed[1], threes[1])  # 3 and 13 show class 3
    sevens, _ = sample("sevens", "--class", "7")
    assert (sevens != threes).any()
    _, error = sample("none", "--class", "10")
    assert error == "error: class is '10'; it must be a number from 0 to 9, or one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n"
    out = str(tmp_path / "walk.gif")
    assert (
        main(["interpolate", "--checkpoint", run.out, "--seeds", "1-2", "--steps", "2", "--out", out, "--class", "4"])
        == 0
    )


def test_class_names_and_labels_of_dataset_json(tmp_path):
    """As stylegan3 has them, and as folders."""
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / "a.png")
    assert open_source(tmp_path).classes == ["cat", "dog"]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["cat/a.png", 4], ["dog/a.png", 1]]}))
    assert open_source(tmp_path).labels == [1, 0]


def test_what_is_refused(tiny, classes, tiny_run, tmp_path, folder):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("L", (8, 8)).save(flat / "a.png")
    with pytest.raises(ValueError, match=r"conditional needs labels, which data .*flat.* has not: put each class"):
        conditional(tiny, str(flat))
    with pytest.raises(ValueError, match="flat' has no labels, and the networks have 10 classes"):
        train(classes, replace(tiny_run, data=str(flat)), progress=False)
    three = replace(tiny, **{name: replace(getattr(tiny, name), classes=3) for name in ("generator", "discriminator")})
    with pytest.raises(ValueError, match=r"data 'digits' has 10 classes, and generator\.classes is 3; they must agree"):
        train(three, tiny_run, progress=False)
    train(tiny, replace(tiny_run, out=str(tmp_path / "plain")), progress=False)
    arguments = ["sample", "--checkpoint", str(tmp_path / "plain"), "--out", str(tmp_path / "x.png"), "--class", "2"]
    assert main(arguments) == 1


def test_a_run_goes_on_with_the_same_classes(tiny, tiny_run, tmp_path):
    data = tmp_path / "pets"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 60 * i).save(data / name / f"{i}.png")
    run, recipe = replace(tiny_run, data=str(data), sample_count=4), conditional(tiny, str(data))
    train(replace(recipe, steps=1), run, progress=False)
    (data / "dog").rename(data / "ant")
    with pytest.raises(
        ValueError, match=r"pets' has other classes than .*step-00000001 .*class 0 is 'ant', and was 'cat'"
    ):
        train(replace(recipe, steps=2), replace(run, resume="latest"), progress=False)
    (data / "ant").rename(data / "dog")
    train(replace(recipe, steps=2), replace(run, resume="latest"), progress=False)


def test_command_line(capsys):
    options = "--data digits --out y --preset digits --conditional"
    parsed = parse(options.split())
    assert parsed.conditional and parsed.recipe.generator.classes == 0
    assert main(["train", *options.split(), "--loss.r1", "0", "--loss.r2", "0", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["generator"]["classes"] == 10
    more = "--generator.classes 4 --discriminator.classes 4 --discriminator vitgan"
    other = parse(["--data", "x", "--out", "y", *more.split()])
    assert other.recipe.discriminator.classes == 4


def test_grids_show_every_class_and_the_distance_their_shares():
    assert monitor.class_rows(0, 4) is None and monitor.class_shares(None, 4) is None
    assert monitor.class_rows(3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    shares = monitor.class_shares([0] * 90 + [1] * 10, 100)
    assert shares.bincount().tolist() == [90, 10]
