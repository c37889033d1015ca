"""`--backend` of the commands that load a generator: one that cannot run it is refused before anything is written."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import fields, is_dataclass
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gans.commands import evaluate
from gans.commands.cli import COMMANDS, main
from gans.commands.generators import attention_backend, check_backend
from gans.recipes.config import RunConfig, to_dict
from gans.recipes.named import preset
from gans.recipes.registry import build
from gans.training.dry_run import describe
from tests.gans.attending_generators import GENERATORS

REASON = "neighborhood must be one of ('full', 'grid'), got neighborhood"
"""Why `matmul` does not run StyleNAT."""

COMMANDS_WITH_BACKEND = {
    "sample": "--out out",
    "interpolate": "--out out.gif",
    "style-mixing": "--out out.png",
    "attention-map": "--out out.png",
    "evaluate": "--reference digits --count 5 --json out.json --cache cache",
    "explore": "--no-browser",
    "project": "--out out --image given.png",
    "throughput": "",
}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Of a StyleNAT; and what is neither here to load, nor wanted."""
    config = GENERATORS["stylenat"]
    (tmp_path / "checkpoint").mkdir()
    save_file(build(config).state_dict(), tmp_path / "checkpoint" / "generator_ema.safetensors")
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({"recipe": {"generator": to_dict(config)}}))
    Image.new("RGB", (16, 16)).save(tmp_path / "given.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gans.commands.explore_page", ModuleType("explore_page"))
    monkeypatch.setattr(evaluate, "make_vectors", lambda *names, **files: torch.nn.Identity())
    return tmp_path / "checkpoint"


def takes_backend(command):
    module = importlib.import_module(f"gans.commands.{command.replace('-', '_')}")
    own = [each for each in vars(module).values() if is_dataclass(each) and each.__module__ == module.__name__]
    return any(field.name == "backend" for each in own for field in fields(each))


def test_all_commands_that_take_one_are_here():
    assert set(COMMANDS_WITH_BACKEND) == {command for command in COMMANDS if takes_backend(command)}


@pytest.mark.parametrize(("command", "options"), COMMANDS_WITH_BACKEND.items())
def test_one_that_cannot_run_the_generator_is_refused(command, options, checkpoint, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    arguments = [command, "--checkpoint", str(checkpoint), "--device", "cpu", *options.split()]
    for name, error in (
        ("matmul", f"backend 'matmul' cannot run this generator on cpu: {REASON}"),
        ("nothing", "backend must be one of ('auto', 'cuda', 'triton', 'cpu', 'matmul', 'reference'), got 'nothing'"),
    ):
        assert main([*arguments, "--backend", name]) == 1
        assert capsys.readouterr() == ("", f"error: {error}\n")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["sample", "export"])
def test_one_of_the_environment_is_refused(command, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NATTEN_EXT_BACKEND", "matmul")
    assert main([command, "--checkpoint", str(checkpoint), "--out", "out"]) == 1
    assert capsys.readouterr().err.startswith("error: backend 'matmul' cannot run this generator on ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("by_training", [False, True])
def test_an_empty_name_is_refused(by_training):
    """Not as if none were given."""
    with pytest.raises(ValueError, match=r"backend must be one of .*, got ''"):
        if by_training:
            describe(preset("digits"), RunConfig(data="digits", out="run", device="cpu", backend=""))
        else:
            check_backend(build(GENERATORS["stylenat"]), "")
    with pytest.raises(ValueError, match=r"backend must be one of .*, got ''"), attention_backend(""):
        pass


@pytest.mark.parametrize("kind", GENERATORS)
def test_one_that_can_run_the_generator_is_not(kind):
    """And nothing of the question is left in the generator."""
    generator = build(GENERATORS[kind]).eval().requires_grad_(False)
    z = torch.randn(2, generator.config.latent_dim)
    check_backend(generator, "cpu")
    check_backend(generator, None)
    assert torch.isfinite(generator(z)).all()
