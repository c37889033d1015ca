"""benchmarks.gpu_train without its long parts: what is asked of each step, and what is written of each ending."""

import json

import pytest

from benchmarks import gpu_train
from benchmarks.gpu.processes import Ended
from gans.training.profile import StepCost


@pytest.fixture
def training(monkeypatch):
    """The commands that would train; each ends as ``training.ended`` says."""

    class FakeProcess:
        commands, ended = [], Ended(None, "")

        def __init__(self, command, log):
            self.commands.append(list(map(str, command)))

        def wait(self, seconds):
            assert seconds > 0
            return self.ended

    monkeypatch.setattr(gpu_train, "Process", FakeProcess)
    return FakeProcess


def check(tmp_path, *more):
    status = gpu_train.main(["--out", str(tmp_path), "--device", "cpu", *more])
    return status, json.loads((tmp_path / "gpu_train.json").read_text()), (tmp_path / "gpu_train.md").read_text()


def test_steps_and_training(tmp_path, monkeypatch, training):
    asked = []

    def measure(recipe, *, backend, **options):
        asked.append((recipe.batch_d, recipe.loss.penalty_mode, backend, options["update"]))
        if backend == "reference":
            raise RuntimeError("measuring failed:\ntorch.OutOfMemoryError: CUDA out of memory")
        return StepCost("cpu", 0.25, 64.0)

    monkeypatch.setattr(gpu_train, "measure_apart", measure)
    status, result, page = check(tmp_path, "--preset", "digits", "--minutes", "1")
    assert status == 0
    assert asked == [
        (2, penalty, backend, "discriminator")
        for penalty in ("exact", "exact", "finite-difference")
        for backend in ("auto", "reference")
    ]
    fused, naive = result["steps"][:2]
    assert (fused["seconds"], fused["attention"]) == (0.25, "fused")
    assert "out of memory" in naive["skipped"]
    assert "| digits, discriminator | 2 | fp32 | exact | fused | cpu | 250.0 | 8.0 | 64 |" in page
    (command,) = training.commands
    assert command[command.index("--preset") + 1] == "digits"


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("wrong"), 1), (TimeoutError("late"), 0)])
def test_a_step_that_fails_and_one_that_takes_too_long(tmp_path, monkeypatch, training, error, status):
    def measure(recipe, **options):
        raise error

    monkeypatch.setattr(gpu_train, "measure_apart", measure)
    assert check(tmp_path)[0] == status


def test_training_that_ends_early_is_a_failure(tmp_path, monkeypatch, training):
    monkeypatch.setattr(gpu_train, "measure_apart", lambda recipe, **options: StepCost("cpu", 0.25, 64.0))
    training.ended = Ended(2, "no such data")
    status, result, _ = check(tmp_path)
    assert status == 1
    assert "no such data" in result["training"]["error"]


def test_arguments_that_make_no_sense(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for arguments, message in ((["--minutes", "0"], "got 0"), ([], "is there already")):
        with pytest.raises(SystemExit):
            gpu_train.parse(["--out", str(tmp_path), "--device", "cpu", *arguments])
        assert message in capsys.readouterr().err
