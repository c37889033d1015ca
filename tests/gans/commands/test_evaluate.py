"""evaluate and train-judge: measures against their definitions, networks, judge, cache, command line."""

from __future__ import annotations

import json
import math
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gans.commands.cli import main
from gans.common.files import save_tensors
from gans.data.loading import load_images
from gans.data.sources import open_source
from gans.evaluation import measures, reference
from gans.evaluation.metrics import Metric, make_metric
from gans.features import inception, judge
from gans.features.by_name import make_vectors
from gans.features.network import VectorNetwork, with_channels


@pytest.fixture(autouse=True)
def few_subsets(monkeypatch):
    """Kernel distances over 100 subsets of 1000 take most of a minute."""
    monkeypatch.setattr(measures, "KERNEL_SUBSETS", 5)
    monkeypatch.setattr(measures, "KERNEL_SUBSET_SIZE", 300)


def said(capsys, *arguments, status=0):
    """What a command says: stdout where it succeeds, stderr (on one line) where it fails."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:  # tyro's, for values that an arguments class refuses
        assert exit.code == 2 and status == 1
        code = 1
    assert code == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else " ".join(captured.err.split())


# Measures: both libraries against the formulas


def features(count, dim=6, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) * scale + shift


def test_frechet_is_the_distance_of_gaussians():
    """Commuting covariances: |m|^2 + sum (sqrt(a) - sqrt(b))^2."""
    base = features(400, 3).double()
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(base.T))).T
    spread, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([0.3, 0.0, -1.0]).double()
    expected = float(shift.square().sum() + (spread - 1).square().sum())
    assert measures.frechet(base, base * spread + shift) == pytest.approx(expected, rel=1e-6)


def test_kernel_is_the_unbiased_discrepancy():
    real, fake = features(40, 5, 1).double(), features(40, 5, 2, shift=0.5).double()

    def k(a, b):
        return (a @ b.T / 5 + 1) ** 3

    def off_diagonal(matrix):
        return (matrix.sum() - matrix.trace()) / (40 * 39)

    expected = off_diagonal(k(real, real)) + off_diagonal(k(fake, fake)) - 2 * k(real, fake).mean()
    state = torch.get_rng_state()
    assert measures.kernel(real, fake) == pytest.approx(float(expected), rel=1e-9)  # 40 images: one subset, all of them
    assert torch.equal(torch.get_rng_state(), state)
    large = features(400, 4, 3), features(400, 4, 4)
    assert measures.kernel(*large) == measures.kernel(*large)  # the subsets are the same every time


def test_precision_and_recall():
    real, fake = features(60, 2, 5).double(), features(50, 2, 6, scale=0.3).double()

    def share_within(points, others, k):
        radii = torch.cdist(others, others).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
        return float((torch.cdist(points, others) < radii).any(1).double().mean())

    precision, recall = measures.precision_recall(real, fake, neighbours=3)
    assert precision == pytest.approx(share_within(fake, real, 3))
    assert recall == pytest.approx(share_within(real, fake, 3))
    assert recall < 0.7 < precision  # narrow samples are precise and do not cover


def test_measures_refuse():
    with pytest.raises(ValueError, match=r"shapes \(4, 6\) and \(4, 5\)"):
        measures.frechet(features(4), features(4, 5))
    with pytest.raises(ValueError, match="needs 2 of each"):
        measures.kernel(features(4), features(1))
    with pytest.raises(ValueError, match="needs 5 of each"):
        measures.precision_recall(features(4), features(9))


# The judge


@pytest.fixture(scope="module")
def digits_judge(tmp_path_factory):
    """A judge of scikit-learn's digits, trained by the command; 8 px keep it to seconds."""
    path = tmp_path_factory.mktemp("judge") / "digits.safetensors"
    options = ["--data", "digits", "--size", "8", "--channels", "1", "--epochs", "3", "--lr", "0.01"]
    options += ["--batch", "32", "--device", "cpu", "--width", "16", "--features", "32"]
    assert main(["train-judge", *options, "--out", str(path)]) == 0
    return path


def test_a_judge_is_no_folder(tmp_path, capsys):
    folder = tmp_path / "judge.safetensors"
    folder.mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["train-judge", "--data", "digits", "--out", str(folder)])
    assert stop.value.code == 2
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["train-judge", "--data", "digits", "--out", str(tmp_path / "file" / "x.safetensors")]) == 1
    assert capsys.readouterr().err.endswith(f"{str(tmp_path / 'file')!r} is something else\n")


def test_judge_learns_and_is_loaded_as_saved(digits_judge):
    network = make_vectors("judge", judge=digits_judge)
    assert not network.judge.training and network.num_features == 32
    assert float(network.about.split(" px, ")[1].split(" %")[0]) > 80
    source = open_source("digits")
    images = load_images(source, size=8, channels=1, limit=1797)
    right = network.judge(images).argmax(1) == torch.tensor(source.labels)
    assert right.float().mean() > 0.8
    assert network(images[:3].expand(-1, 3, -1, -1)).shape == (3, 32)
    assert network(nn.functional.interpolate(images[:3], scale_factor=4)).shape == (3, 32)


def test_rotations():
    images = torch.arange(4.0).view(1, 1, 2, 2).expand(4, 1, 2, 2)
    turned = judge.rotate(images, torch.tensor([0, 1, 2, 3]))
    for k in range(4):
        assert torch.equal(turned[k], images[0].rot90(k, (1, 2)))


def test_judge_learns_rotations_and_repeats_itself():
    source = open_source("digits")
    images = torch.cat(list(reference.read_batches(source, list(range(600)), size=8, channels=1, batch=100)))
    config = judge.JudgeConfig(size=8, channels=1, classes=4, width=8, features=32)
    schedule = judge.Schedule(epochs=6, batch=32, lr=0.01, held_out=0.2)
    runs = [judge.train_judge(config, schedule, images, None, device=torch.device("cpu")) for _ in range(2)]
    assert runs[0][1] == runs[1][1] > 0.4  # a guess is right for a quarter
    for a, b in zip(runs[0][0].state_dict().values(), runs[1][0].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_judge_that_is_not_finite_is_none():
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    config = judge.JudgeConfig(size=8, channels=1, classes=4, width=8, features=32)
    schedule = judge.Schedule(epochs=1, batch=16, weight_decay=1e300)
    with pytest.raises(ValueError, match=r"epoch 1 led to numbers that are not finite .*weight_decay 1e\+300"):
        judge.train_judge(config, schedule, images, None, device=torch.device("cpu"))


def test_judge_augmentation_keeps_pixels():
    torch.manual_seed(0)
    images = torch.rand(50, 1, 16, 16)
    out = judge.augment(images)
    padded = nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    windows = padded.unfold(2, 16, 1).unfold(3, 16, 1).reshape(50, 25, 16, 16)
    flipped = nn.functional.pad(images.flip(3), (2, 2, 2, 2), mode="replicate").unfold(2, 16, 1).unfold(3, 16, 1)
    candidates = torch.cat([windows, flipped.reshape(50, 25, 16, 16)], dim=1)
    matches = (candidates == out).flatten(2).all(2)
    assert matches.any(1).all() and 10 < matches[:, :25].any(1).sum() < 40


def test_train_judge_refuses(folder, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("L", (8, 8)).save(flat / "a.png")
    out = ["--out", tmp_path / "j.safetensors"]
    for arguments, message in (
        (["--data", folder, *out], "12 images are too few"),
        (["--data", flat, *out, "--task", "classes"], "has no classes"),
        (["--data", tmp_path / "missing", *out], "does not exist"),
        (["--data", folder, "--out", tmp_path / "j.pt"], "must end in .safetensors"),
        (["--data", folder, *out, "--size", "4"], "needs at least 8 pixels"),
        (["--data", folder, *out, "--epochs", "0"], "epochs (0)"),
    ):
        assert message in said(capsys, "train-judge", *arguments, status=1)
    assert not (tmp_path / "j.safetensors").exists()


# Networks


def test_lite1_is_the_network_of_its_package():
    network = make_vectors("lite1")
    images = torch.rand(2, 3, 240, 240, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert network(images).shape == (2, 1280)
    # The classifier sits right on these features, so its scores follow from them.
    scores = nn.functional.linear(network(images), network.network._fc.weight, network.network._fc.bias)
    assert scores.shape == (2, 1000)
    assert torch.equal(network(images[:, :1]), network(images[:, :1].expand(-1, 3, -1, -1)))


class ScriptedInception(nn.Module):
    """Takes what NVIDIA's file takes."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.dtype == torch.uint8 and return_features
        return images.float().mean(dim=(2, 3)).repeat(1, 683)[:, :2048]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inception_from_torchscript(tmp_path):
    path = tmp_path / "inception.pt"
    torch.jit.script(ScriptedInception()).save(path)
    network = make_vectors("inception", inception_weights=path)
    images = torch.full((2, 1, 8, 8), 1.0)
    assert torch.equal(network(images), torch.full((2, 2048), 255.0))


def test_inception_without_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: None)
    torch.save({}, tmp_path / "weights.pth")
    for weights in (None, tmp_path / "weights.pth"):
        with pytest.raises(ValueError, match="needs torch_fidelity and torchvision"):
            make_vectors("inception", inception_weights=weights)
    with pytest.raises(FileNotFoundError, match="are not a file"):
        make_vectors("inception", inception_weights=tmp_path / "missing.pt")


def test_networks_refuse(tmp_path):
    with pytest.raises(ValueError, match="--judge FILE"):
        make_vectors("judge")
    with pytest.raises(FileNotFoundError, match="train-judge"):
        make_vectors("judge", judge=tmp_path / "missing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a file of train-judge"):
        make_vectors("judge", judge=tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="must be one of judge, lite1, inception, random"):
        make_vectors("vgg")


# Reference, cache, command


class Counting(VectorNetwork):
    """The means of the four quarters of each channel; counts the images it has seen."""

    name, about, num_features, fingerprint = "counting", "for tests", 12, "1"

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return nn.functional.adaptive_avg_pool2d(with_channels(images, 3), 2).flatten(1)


def reference_features(source, cache, network=None, **changes):
    network = network or Counting()
    settings = {"name": "x", "size": 8, "channels": 3, "limit": 0} | changes
    real = reference.Reference(open_source(source), **settings)
    found = real.features(network, torch.device("cpu"), batch=5, workers=0, cache=cache)
    return found, network.seen


def test_cache_holds_as_long_as_nothing_changes(folder, tmp_path):
    cache = tmp_path / "cache"
    first, seen = reference_features(folder, cache)
    assert seen == 12 and first.shape == (12, 12)
    again, seen = reference_features(folder, cache)
    assert seen == 0 and torch.equal(again, first)
    assert reference_features(folder, None)[1] == 12
    assert reference_features(folder, cache, size=4)[1] == 12
    assert reference_features(folder, cache, channels=1)[1] == 12
    assert reference_features(folder, cache, limit=7)[1] == 7
    other = Counting()
    other.fingerprint = "2"
    assert reference_features(folder, cache, other)[1] == 12
    # An image of the same length in the same place, written later.
    image = folder / "part0" / "deep" / "image00.png"
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert reference_features(folder, cache)[1] == 12
    assert reference_features(folder, cache)[1] == 0
    rows = [f"{name},{name[:5]}" for name in open_source(folder).names]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    one, seen = reference_features(folder, cache, label=1)
    assert seen == 4 and torch.equal(one, first[4:8])
    assert reference_features(folder, cache, label=1)[1] == 0 and reference_features(folder, cache, label=2)[1] == 4
    assert reference_features(folder, cache, label=1, limit=3)[1] == 3
    for file in cache.iterdir():
        file.write_bytes(b"half of it")
    assert torch.equal(reference_features(folder, cache)[0], first)


def test_archives_are_known_by_their_contents(tmp_path):
    digests = []
    for value, folder in ((10, "a"), (20, "b"), (10, "c")):
        path = tmp_path / folder / "images.zip"
        path.parent.mkdir()
        with zipfile.ZipFile(path, "w") as archive, archive.open("1.png", "w") as file:
            Image.new("L", (8, 8), value).save(file, "PNG")
        digests.append(reference.digest(open_source(path)))
    assert digests[0] == digests[2] != digests[1]
    assert reference.digest(open_source("digits")) == reference.digest(open_source("digits"))


def test_measured_are_the_images_as_they_would_be_saved():
    network = Counting()
    images = torch.tensor([-1.2, 0.0, 0.5012, 2.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    twice = [network, network]
    found, again = reference.features_of([images[:3], images[3:]], twice, torch.device("cpu"), total=4, description="x")
    assert torch.equal(found, again)
    expected = torch.tensor([0, 128, 191, 255]) / 127.5 - 1
    torch.testing.assert_close(found, expected[:, None].expand(4, 12))
    with pytest.raises(ValueError, match="not finite"):
        bad = nn.Module()
        bad.forward, bad.name = lambda x: x.mean((2, 3)) / 0, "bad"
        reference.features_of([images], [bad], torch.device("cpu"), total=4, description="x")


def test_floor_is_of_disjoint_parts():
    real = torch.arange(10.0)[:, None]
    rest, held = reference.split_for_floor(real, 3)
    assert len(held) == 3 and sorted(torch.cat([rest, held]).flatten().tolist()) == list(range(10))
    assert len(reference.split_for_floor(real, 100)[1]) == 5


def test_evaluate(digits_judge, tmp_path, capsys):
    """Digits against digits do as well as the floor; dimmed ones do not."""
    source = open_source("digits")
    same, dim = tmp_path / "same.zip", tmp_path / "dim"
    dim.mkdir()
    with zipfile.ZipFile(same, "w") as archive:
        for i in range(0, 1797, 3):
            with archive.open(f"{i}.png", "w") as file:
                source.open(i).save(file, "PNG")
            Image.fromarray(np.asarray(source.open(i)) // 3).save(dim / f"{i}.png")
    options = ["evaluate", "--reference", "digits", "--networks", "judge", "--judge", digits_judge]
    options += ["--device", "cpu", "--cache", tmp_path / "cache"]
    results = []
    for images in (same, dim):
        printed = said(capsys, *options, "--images", images, "--json", tmp_path / "out.json")
        assert "real against real: 599 of the reference against its other 1,198" in printed
        results.append(json.loads((tmp_path / "out.json").read_text()))
        for name in ("frechet_judge", "kernel_judge", "precision_judge", "recall_judge"):
            assert name in printed and math.isfinite(results[-1]["measures"][name]["value"])
    good, bad = (result["measures"] for result in results)
    assert good["frechet_judge"]["value"] < 2 * good["frechet_judge"]["real_against_real"]
    assert bad["frechet_judge"]["value"] > 10 * bad["frechet_judge"]["real_against_real"]
    assert bad["kernel_judge"]["value"] > 10 * abs(good["kernel_judge"]["value"])
    assert good["precision_judge"]["value"] > 0.9 > bad["precision_judge"]["value"]
    assert good["frechet_judge"]["real_against_real"] == bad["frechet_judge"]["real_against_real"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_evaluate_a_checkpoint(tiny, digits_judge, tmp_path, capsys):
    from safetensors.torch import save_file

    from gans.recipes.config import to_dict
    from gans.recipes.registry import build

    save_file(build(tiny.generator).state_dict(), tmp_path / "generator_ema.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"recipe": to_dict(tiny)}))
    options = ["evaluate", "--reference", "digits", "--networks", "judge", "--judge", digits_judge, "--device", "cpu"]
    options += ["--cache", tmp_path / "cache", "--checkpoint", tmp_path]
    printed = said(capsys, *options, "--count", "20", "--batch", "8")
    assert "(seeds 0-19): 20 images of 8 px" in printed
    assert "20 images are too few for 32 features" in printed
    assert "leave it out" in said(capsys, *options, "--size", "16", status=1)


def test_evaluate_one_class(tiny, digits_judge, tmp_path, capsys):
    from dataclasses import replace

    from gans.recipes.config import to_dict
    from gans.recipes.registry import build

    recipe = replace(tiny, **{part: replace(getattr(tiny, part), classes=4) for part in ("generator", "discriminator")})
    save_tensors(build(recipe.generator).state_dict(), tmp_path / "generator_ema.safetensors")
    names = ["0", "3", "7", "eight"]
    (tmp_path / "config.json").write_text(json.dumps({"recipe": to_dict(recipe), "classes": names}))
    options = ["evaluate", "--networks", "judge", "--judge", digits_judge, "--device", "cpu", "--count", "8"]
    options += ["--cache", tmp_path / "cache", "--checkpoint", tmp_path, "--reference"]
    printed = said(capsys, *options, "digits", "--class", "7")
    assert "(seeds 0-7), class 7: 8 images of 8 px" in printed and "against digits, class 7: 179 images" in printed
    assert "against digits: 1,797 images" in said(capsys, *options, "digits")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(10):
        Image.new("L", (8, 8), 20 * i).save(flat / f"{i}.png")
    assert f"against {flat}: 10 images" in said(capsys, *options, flat, "--class", "eight")  # it has no labels
    message = "class is 'eight', which reference 'digits' has not; it has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert message in said(capsys, *options, "digits", "--class", "eight", status=1)
    assert "class is 'cat'; it must be" in said(capsys, *options, "digits", "--class", "cat", status=1)
    images = ["evaluate", "--reference", "digits", "--images", flat, "--class", "7"]
    assert "which is for images that a checkpoint makes" in said(capsys, *images, status=1)


def test_evaluate_refuses(folder, tmp_path, capsys):
    for arguments, message in (
        ([], "give one of checkpoint and images"),
        (["--images", folder, "--checkpoint", folder], "give one of checkpoint and images"),
        (["--images", folder, "--networks", "judge"], "--judge FILE"),
        (["--images", folder, "--networks", "lite1", "lite1"], "name each network once"),
        (["--images", folder, "--count", "-1"], "count is -1"),
        (["--images", folder, "--count", "4"], "count is 4; 3 neighbours need 5 images or more"),
        (["--images", folder, "--manifold-count", "4"], "3 neighbours need 2 more"),
        (["--images", tmp_path / "missing"], "does not exist"),
        (["--checkpoint", folder], "has no config.json"),
    ):
        assert message in said(capsys, "evaluate", "--reference", "digits", *arguments, status=1)


def test_metrics_of_the_trainer(digits_judge):
    real = load_images(open_source("digits"), size=8, channels=1, limit=1797)
    metric = make_metric(f"judge:{digits_judge}", real[::2])
    assert metric.name == "frechet_judge" and metric.count == 899
    assert 0 < metric(real[1::2]) < 2 * metric.floor < metric(-real[1::2])
    assert make_metric("random", real).name == "frechet_random"
    for choice in ("judge", "inception", "judge:"):
        with pytest.raises(ValueError, match="metric is"):
            make_metric(choice, real)
    with pytest.raises(ValueError, match="needs at least 4"):
        Metric(real[:3], make_vectors("judge", judge=digits_judge))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": float("nan")}, r"lr \(nan\)"),
        ({"weight_decay": -1.0}, r"weight_decay \(-1"),
        ({"epochs": 0}, r"epochs \(0\)"),
    ],
)
def test_schedules_of_a_judge_without_sense(change, message):
    with pytest.raises(ValueError, match=message):
        judge.Schedule(**change)
