"""export, and throughput."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from gans.commands.cli import main
from gans.commands.generators import load_generator, render
from gans.commands.train import conditional
from gans.training.loop import train


@pytest.fixture
def run(tiny, tiny_run):
    train(replace(conditional(tiny, "digits"), steps=1), tiny_run, progress=False)
    return Path(tiny_run.out)


def test_an_export_is_a_generator_as_any(run, tiny, tiny_run, tmp_path, capsys):
    out = tmp_path / "tiny-digits"
    assert main(["export", "--checkpoint", str(run), "--out", str(out), "--license", "mit"]) == 0
    files = {path.name for path in out.iterdir()}
    assert files == {"model.safetensors", "config.json", "README.md", "samples.png", "SHA256SUMS"}
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "mit",
        "library_name": "natten_ext",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["gan", "transformer", "transgan"],
    }
    assert "# tiny-digits\n" in body and "classes: 0, 1, 2, 3" in body and "steps: 1 of batches of 6" in body
    assert json.loads((out / "config.json").read_text())["model_type"] == "transgan"
    assert np.asarray(Image.open(out / "samples.png")).shape == (38 * 16, 38 * 16)
    ours, theirs = (load_generator(path, torch.device("cpu")) for path in (run, out))
    assert theirs.class_names == ours.class_names
    (a,), (b,) = (render(generator, [4, 5]) for generator in (ours, theirs))
    assert torch.equal(a, b)
    # the code of the card
    code = body.split("```python\n")[1].split("```")[0].replace("FOLDER", str(out))
    scope: dict = {}
    exec(code, scope)
    assert scope["images"].shape == (4, 1, 8, 8)
    again = replace(tiny_run, out=str(tmp_path / "again"), init=str(out))
    train(replace(conditional(tiny, "digits"), steps=0), again, progress=False)
    account = json.loads((tmp_path / "again" / "config.json").read_text())["init"]
    assert account[1].startswith(f"generator_ema from {out}/model: ") and "starts afresh" in account[2]
    assert main(["export", "--checkpoint", str(run), "--out", str(out)]) == 1
    assert "exists; give another folder" in capsys.readouterr().err


def test_throughput(run, capsys):
    assert main(["throughput", "--checkpoint", str(run), "--batches", "1", "3", "--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| batch | ms | images a second |" and [line.split("|")[1].strip() for line in lines[4:]] == [
        "1",
        "3",
    ]
    batch, milliseconds, rate = (float(cell) for cell in lines[5].strip("| ").split("|"))
    assert rate == pytest.approx(1000 * batch / milliseconds, rel=0.2)
    with pytest.raises(SystemExit):
        main(["throughput"])
    assert "give either checkpoint or preset" in capsys.readouterr().err
