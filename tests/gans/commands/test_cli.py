from __future__ import annotations

import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import natten_ext
from gans.commands import cost, demo, presets
from gans.commands.cli import COMMANDS, main
from gans.commands.train import parse
from gans.data.sources import open_source
from gans.models.vitgan import ViTDiscriminatorConfig
from gans.recipes.config import RunConfig
from gans.recipes.named import preset
from gans.training import checkpoint
from gans.training.interrupt import Interrupted
from gans.training.profile import StepCost

OPTIONS = """--preset digits --data digits --steps 2 --batch-d 2 --batch-g 2 --n-critic 1
    --generator.base-dim 64 --discriminator.patch-dims 8 8 --sample-count 4 --threads 1"""
SMALL = OPTIONS.split()


def test_train_sample_and_resume(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *SMALL, "--out", str(out)]) == 0
    assert "step-00000002" in capsys.readouterr().out
    config = checkpoint.load_config(out / "checkpoints" / "step-00000002")
    assert config["recipe"]["generator"]["base_dim"] == 64
    assert main(["train", *SMALL, "--out", str(out), "--steps", "3", "--resume", "latest"]) == 0
    picture = tmp_path / "samples.png"
    arguments = ["sample", "--checkpoint", str(out), "--out", str(picture), "--seeds", "0-3", "--scale", "2"]
    assert main(arguments) == 0
    assert Image.open(picture).size == (64, 64)
    assert main(["figures", "--run", str(out), "--out", str(tmp_path / "figures"), "--neighbours", "2"]) == 0
    expected = {"samples.png", "curves.png", "neighbours.png", "report.html"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == expected


def test_overrides_start_from_the_preset():
    arguments = """--preset=stl10 --data x --out y --loss.gp-weight 5 --generator.windows 4 8 16
        --ema.decay 0.99 --discriminator.augment color --images.no-flip --backend reference --device cpu"""
    arguments = parse(arguments.split())
    recipe, base = arguments.recipe, preset("stl10")
    assert recipe.loss.gp_weight == 5 and recipe.ema.decay == 0.99 and not recipe.images.flip
    assert recipe.generator.windows == (4, 8, 16) and recipe.generator.depths == base.generator.depths
    assert recipe.discriminator.augment == ("color",)
    assert arguments.run.backend == "reference" and arguments.run.device == "cpu"


def parsed(options: str):
    return parse(["--data", "x", "--out", "y", *options.split()]).recipe


def test_parts_of_other_recipes():
    recipe = parsed("--preset cifar10-small --discriminator cifar10 --loss.r1 2 --discriminator.heads 3")
    assert recipe.generator == preset("cifar10-small").generator
    assert recipe.discriminator == replace(preset("cifar10").discriminator, heads=3)
    assert recipe.loss.r1 == 2
    recipe = parsed("--preset cifar10 --discriminator vitgan --loss vitgan32")
    assert recipe.discriminator == ViTDiscriminatorConfig() and recipe.loss == preset("vitgan32").loss
    with pytest.raises(ValueError, match=r"one of transgan, vitgan, .*cifar10-small.*; got 'cnn'"):
        parsed("--generator cnn")
    with pytest.raises(ValueError, match=r"generator.image_size is 48 and discriminator.image_size is 32"):
        parsed("--generator stl10")


def test_dry_run_prints_the_resolved_settings(tmp_path, capsys):
    out = tmp_path / "never"
    assert main(["train", "--preset", "cifar10-small", "--data", "digits", "--out", str(out), "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["parameters"] == {"generator": 3_025_375, "discriminator": 150_508}
    memory = shown["memory_mib"]
    assert memory["weights, gradients, Adam and average"] == pytest.approx(
        (3.025 * 5 + 0.1505 * 4) * 4e6 / 2**20, rel=0.01
    )
    assert 50 < memory["activations, discriminator update"] < memory["total"] < 200
    rows = [row for row in shown["attention"] if row["network"] == "generator"]
    assert [(row["shape"], row["keys"], row["calls"]) for row in rows] == [
        ([16, 8, 8, 4, 64], 64, 1),
        ([16, 16, 16, 4, 16], 256, 1),
        ([16, 32, 32, 4, 4], 1024, 1),
    ]
    assert all(
        row["backend"] in natten_ext.backends.choice.NAMES and row["dtype"] == "float32" for row in shown["attention"]
    )
    assert shown["recipe"]["lr_g"] == 1e-3
    assert (shown["run"]["checkpoint_every"], shown["run"]["sample_every"]) == (40, 20)
    assert not out.exists()


def test_dry_run_refuses_what_training_does(tmp_path, capsys):
    out = tmp_path / "run"
    (out / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "file").touch()
    new, here = ["--out", str(tmp_path / "new")], ["--out", str(out)]
    for arguments, message in (
        (["--data", str(tmp_path / "missing"), *new], "missing' does not exist; give a folder"),
        (["--data", str(tmp_path), *new], "has no images"),
        (["--data", "digits", "--images.split", "val", *new], "'digits' has no splits"),
        (["--data", "digits", "--generator.classes", "3", "--discriminator.classes", "3", *new], "has 10 classes"),
        (["--data", "digits", *here], "holds a run; continue it with resume 'latest'"),
        (["--data", "digits", "--out", str(tmp_path / "file")], "file' cannot be a folder: "),
        (["--data", "digits", "--out", str(tmp_path / "file" / "a" / "b")], "file' is something else"),
        (["--data", "digits", "--resume", str(tmp_path), *new], "which is not a checkpoint folder"),
        (["--data", "digits", "--init", str(tmp_path), *new], "which holds no weights"),
    ):
        for dry_run in ([], ["--dry-run"]):
            assert main(["train", *SMALL, *arguments, *dry_run]) == 1, arguments
            assert message in capsys.readouterr().err, arguments
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["data", "init", "resume"])
def test_an_empty_name_is_refused_in_python(option, tmp_path, monkeypatch):
    """As a path, '' is the current directory, which may well have images."""
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{option} is '', which names nothing"):
        RunConfig(**({"data": "digits", "out": "run"} | {option: ""}))
    with pytest.raises(ValueError, match=r"^data is '', which names nothing"):
        open_source("")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--out", ""], "out"),
        (["--checkpoint="], "checkpoint"),
        (["--data=a=", "--backend", ""], "backend"),
        (["--inception-weights", "", "--out", ""], "inception_weights"),
        (["--pixels", "1,2", "", "--seed", "1"], "pixels"),
        ([""], "argument"),
    ],
)
def test_an_unset_variable_is_no_value(arguments, name, tmp_path, monkeypatch, capsys):
    """Refused whatever the command and option: '' would be the current directory, or as if it were not given."""
    monkeypatch.chdir(tmp_path)
    for command in sorted(COMMANDS):
        assert main([command, *arguments, "--device", "cpu"]) == 1
        assert capsys.readouterr().err == f"error: {name} is '', which names nothing (an unset variable?)\n"
    assert not list(tmp_path.iterdir())


def test_a_backend_that_the_environment_misspells_is_refused(monkeypatch, capsys):
    """By every command, whether it would come to use it or not."""
    monkeypatch.setattr(natten_ext.backends.choice, "_override", "nonsense")
    assert main(["presets", "digits"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: NATTEN_EXT_BACKEND must be one of ") and said.err.endswith("got 'nonsense'\n")
    assert said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_backend_that_cannot_run_the_recipe_is_refused(by_variable, tmp_path, monkeypatch, capsys):
    """Before anything is written. `digits` has full attention and windows, which `matmul` can."""
    if by_variable:
        monkeypatch.setenv("NATTEN_EXT_BACKEND", "matmul")
    out = tmp_path / "run"
    backend = [] if by_variable else ["--backend", "matmul"]
    arguments = ["--data", "digits", "--device", "cpu", "--out", str(out), *backend]
    for dry_run in ([], ["--dry-run"]):
        assert main(["train", "--preset", "stylenat-digits", *arguments, *dry_run]) == 1
        error = "backend 'matmul' cannot run this recipe on cpu: neighborhood must be one of ('full', 'grid'), got "
        assert capsys.readouterr().err == f"error: {error}neighborhood\n"
        assert not out.exists()
    assert main(["train", *SMALL, *arguments]) == 0


def test_presets(monkeypatch, capsys):
    monkeypatch.setattr(presets, "PRESETS", {name: presets.PRESETS[name] for name in ("digits", "stl10")})
    assert main(["presets"]) == 0
    assert "168,466,623" in capsys.readouterr().out
    assert main(["presets", "stl10"]) == 0
    assert json.loads(capsys.readouterr().out)["n_critic"] == 5


def test_errors_are_one_line(tmp_path, capsys):
    assert main(["train", *SMALL, "--data", str(tmp_path / "missing"), "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.startswith("error: data ")
    assert main(["train", "--preset", "nothing", "--data", "x", "--out", "y"]) == 1
    assert "preset must be one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--preset", "digits"])  # data and out are required
    with pytest.raises(SystemExit):
        main(["train", *SMALL, "--out", str(tmp_path / "run"), "--no-such-option", "1"])


def test_cost_shows_fused_and_naive(monkeypatch, capsys):
    asked = {}

    def compare(recipe, **options):
        asked.update(options, batches=(recipe.batch_d, recipe.batch_g, recipe.accumulate), precision=recipe.precision)
        return [StepCost("cpu", 0.5, 100.0), StepCost("reference", 2.0, 800.0)]

    monkeypatch.setattr(cost, "compare", compare)
    options = "--preset stl10 --batch 3 --precision bf16 --threads 2 --device cpu"
    assert main(["cost", *options.split()]) == 0
    assert "| naive / fused | | 4.0 | 8.0 |" in capsys.readouterr().out
    expected = {"update": "discriminator", "device": "cpu", "threads": 2, "repeats": 3}
    assert asked == expected | {"batches": (3, 3, 1), "precision": "bf16"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cost --preset digits --threads -1", "threads is -1; it must be at least 0"),
        ("cost --preset digits --repeats 0", "repeats is 0; it must be at least 1"),
        ("cost --preset digits --batch -1", "batch is -1"),
        ("cost --preset digits --device nope", "device is 'nope'"),
        ("cost --preset digits --device meta", "device is 'meta'"),
        ("throughput --preset digits --threads -1", "threads is -1"),
        ("throughput --preset digits --seconds nan", "seconds is nan"),
        ("figures --run /nowhere --out x", "run is '/nowhere', which is not the folder of a run"),
        ("attention-map --checkpoint x --out y.png --seed -1", "seed is -1"),
        ("sample --checkpoint x --out folder --seeds 1,1-2", "names a seed twice"),
        ("interpolate --checkpoint x --out y.gif --seeds 0,1 --fps 1e-9", "fps is 1e-09"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_any_work(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        assert main(command.split()) == 1
    except SystemExit as usage:
        assert usage.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_demo_that_is_interrupted_keeps_the_status(monkeypatch, capsys):
    def interrupted(options):
        raise Interrupted(signal.SIGTERM, "stopped at step 3; --resume latest goes on")

    monkeypatch.setattr(demo, "_demo", interrupted)
    assert main(["demo"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "interrupted; the next demo starts from the beginning\n"


def test_interrupting(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cost, "run", interrupted)
    assert main(["cost"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# Before a command runs


def gans(*arguments: str, **streams) -> subprocess.CompletedProcess[str]:
    """`python -m gans` as a process of its own."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run([sys.executable, "-m", "gans", *arguments], text=True, **streams)


@pytest.fixture
def unread():
    """The writing end of a pipe whose reader has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def test_help_and_version_do_without_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = gans("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert shown.returncode == 0 and all(f"  {command} " in shown.stdout for command in COMMANDS)
    assert gans("--version").stdout == f"natten_ext {natten_ext.__version__}\n"
    code = "import sys; from gans.commands import cli; "
    code += "[cli.main([a]) for a in ('--help', '--version', 'trian')]; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout.split()
    assert "gans.commands.cli" in modules and not {"torch", "numpy", "tyro"} & set(modules)


def test_the_console_command_is_main():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["gans"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        ([], 2, "usage: ", ""),
        (["help"], 0, "usage: ", ""),
        (["-V"], 0, "natten_ext ", ""),
        (["trian", "--out", "x"], 2, "", "error: no command is called 'trian'; did you mean train?\n"),
        (["Style_Mixing"], 2, "", "error: no command is called 'Style_Mixing'; did you mean style-mixing?\n"),
        (["--out", "digits"], 2, "", "error: no command is called '--out'; there are demo, train, presets, "),
        (["zzz"], 2, "", "error: no command is called 'zzz'; there are demo, train, presets, "),
    ],
)
def test_without_a_command(arguments, status, out, err, capsys):
    assert main(arguments) == status
    shown = capsys.readouterr()
    assert shown.out.startswith(out) and bool(out) == bool(shown.out)
    assert shown.err.startswith(err) and bool(err) == bool(shown.err)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads(unbuffered, unread, monkeypatch):
    """Whether output fails when it is written or is still in a buffer at the end."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    shown = gans("--help", stdout=unread)
    assert (shown.returncode, shown.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [["presets", "digits"], ["cost", "--help"]])
@pytest.mark.parametrize("buffering", [0, -1])
def test_output_of_a_command_that_nobody_reads(arguments, buffering, unread, monkeypatch, capfd):
    """As in a process of its own, which would import torch for it. What a buffer still has can go when it closes."""
    stream = io.TextIOWrapper(os.fdopen(os.dup(unread), "wb", buffering), write_through=not buffering)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(arguments) == 141
        stream.close()
    assert capfd.readouterr().err == ""


def test_messages_that_nobody_reads(unread):
    assert gans("trian", stderr=unread).returncode == 141


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch, capfd):
    def broken(*arguments):
        raise BrokenPipeError(32, "worker died")

    monkeypatch.setattr(cost, "run", broken)
    assert main(["cost"]) == 1
    assert "worker died" in capfd.readouterr().err


def test_a_full_disk_behind_the_output_is_an_error():
    with open("/dev/full", "w") as full:
        shown = gans("--help", stdout=full)
    assert shown.returncode and shown.stderr.startswith("error: [Errno 28] No space left on device\n")


def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "gans.commands.cost")
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["cost"]) == 1
    assert capsys.readouterr().err.startswith("error: cost needs tyro, which is not installed; pip install '.[gans]'")
