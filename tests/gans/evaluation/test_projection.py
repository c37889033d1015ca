"""project: an image that the generator has made is found again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gans.commands.cli import main
from gans.commands.generators import load_generator
from gans.commands.train import conditional
from gans.common import rng
from gans.data.images import grid
from gans.evaluation.projection import ProjectionConfig, feature_distance, project
from gans.features.by_name import make_maps
from gans.models.conditioning import bind
from gans.recipes.registry import build
from gans.training.loop import train
from tests.gans.style_generators import CONFIGS, generator_of

CONFIG = ProjectionConfig(steps=80, features=0.0)


@pytest.mark.parametrize("every_block", [False, True])
def test_an_image_of_the_generator_is_found_in_w(every_block):
    generator = generator_of(CONFIGS["gat"]).float().requires_grad_(False)
    target = generator(torch.randn(1, 6, generator=torch.Generator().manual_seed(3)))
    seen = []
    found = project(
        generator, target, replace(CONFIG, every_block=every_block), report=lambda *step: seen.append(step[:2])
    )
    start = (generator.synthesize(generator.mean_latent()) - target).square().mean()
    assert (found.image - target).square().mean() < start / 20
    assert found.space == "w" and found.code.shape == ((1, 3, 12) if every_block else (1, 12))
    torch.testing.assert_close(generator.synthesize(found.code), found.image)
    assert [step for step, _ in seen] == list(range(80)) and [loss for _, loss in seen] == found.losses


def test_without_a_mapping_network_it_is_found_in_z(tiny):
    """With noise at the attention inputs, which stays the same."""
    torch.manual_seed(0)
    generator = build(tiny.generator).eval().requires_grad_(False)
    for name, parameter in generator.named_parameters():
        if name.endswith("strength"):
            parameter.fill_(0.1)
    with rng.per_image([0]):
        target = generator(torch.randn(1, 6))
    found = project(generator, target, CONFIG)
    assert found.space == "z" and (found.image - target).square().mean() < 0.01 * target.var()
    with pytest.raises(ValueError, match="every_block needs a mapping network, which GeneratorConfig does not have"):
        project(generator, target, replace(CONFIG, every_block=True))


def test_feature_distance_by_formula():
    torch.manual_seed(0)
    network = make_maps("random")
    a, b = torch.rand(2, 1, 3, 128, 128) * 2 - 1
    expected = 0.0
    for x, y in zip(network(a), network(b), strict=True):
        unit = [m / m.norm(dim=1, keepdim=True) for m in (x, y)]
        expected += (unit[0] - unit[1]).square().sum(1).mean() / 4
    torch.testing.assert_close(feature_distance(network)(a, b), expected)
    assert feature_distance(network)(a, a) == 0


def test_command(tiny, tiny_run, tmp_path, capsys):
    train(replace(conditional(tiny, "digits"), steps=1), tiny_run, progress=False)
    generator = load_generator(tmp_path / "run", torch.device("cpu"))
    label = torch.tensor([4])
    target = bind(generator, label)(torch.zeros(1, 6))
    grid(target).save(tmp_path / "given.png")
    arguments = ["project", "--checkpoint", tiny_run.out, "--image", str(tmp_path / "given.png"), "--steps", "20"]
    out = tmp_path / "found"
    assert main([*arguments, "--out", str(out), "--network", "random", "--class", "4", "--scale", "1"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert load_file(out / "latent.safetensors")["z"].shape == (1, 6)
    way = np.asarray(Image.open(out / "way.png"))
    assert way.shape == (8, 9 * 10 - 2) and np.array_equal(way[:, :8], np.asarray(Image.open(tmp_path / "given.png")))
    assert np.array_equal(way[:, -8:], np.asarray(Image.open(out / "projected.png")))
    assert main([*arguments, "--out", str(tmp_path / "other")]) == 1
    assert "class is not given; the generator has 10" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_image_is_read_as_training_reads_it(tiny, tiny_run, tmp_path, capsys):
    train(replace(tiny, steps=0), tiny_run, progress=False)
    upright = Image.new("L", (8, 16), "black")
    upright.paste("white", (0, 0, 8, 8))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was turned: what is upright lies on its left side in the file
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    arguments = ["project", "--checkpoint", tiny_run.out, "--steps", "1", "--network", "none", "--scale", "1"]
    assert main([*arguments, "--image", str(tmp_path / "photo.png"), "--out", str(tmp_path / "found")]) == 0
    given = np.asarray(Image.open(tmp_path / "found" / "way.png"))[:, :8]
    assert (given[:4] == 255).all() and (given[4:] == 0).all()
    (tmp_path / "notes.png").write_text("no image")
    assert main([*arguments, "--image", str(tmp_path / "notes.png"), "--out", str(tmp_path / "other")]) == 1
    assert f"cannot read image '{tmp_path}/notes.png': Pillow knows no such format" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_not_finite_is_no_projection(tiny, steps):
    generator = build(tiny.generator).eval().requires_grad_(False)
    target = torch.zeros_like(generator(torch.randn(1, 6)))
    with pytest.raises(ValueError, match=r"not finite .*lr is 1e\+36"):
        project(generator, target, replace(CONFIG, steps=steps, lr=1e36))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"noise": -1.0}, "noise is -1"),
        ({"noise": float("inf")}, "noise is inf"),
        ({"pixels": 0.0}, "pixels and features are 0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
