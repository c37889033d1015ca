"""Asked to stop, a run finishes its step, writes a checkpoint and says so; one run at a time has a folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gans.commands.cli import main
from gans.commands.demo import run as demo
from gans.commands.train import RUNS, next_folder
from gans.data.decoding import BrokenImageError
from gans.training import checkpoint, interrupt, logs, monitor
from gans.training import loop as trainer
from gans.training.interrupt import Interrupted, StopSignals
from gans.training.lock import locked
from gans.training.loop import train
from tests.gans import processes

OPTIONS = """--preset digits --data digits --batch-d 2 --batch-g 2 --n-critic 1 --generator.base-dim 64
    --discriminator.patch-dims 8 8 --sample-count 4 --threads 1 --device cpu"""
SMALL = OPTIONS.split()


def same_weights(a: Path, b: Path) -> bool:
    files = [(load_file(file), load_file(b / file.name)) for file in sorted(a.glob("*.safetensors"))]
    return len(files) == 3 and all(torch.equal(one[key], two[key]) for one, two in files for key in one)


@pytest.fixture
def signals_at(monkeypatch):
    """A function: sends this process signals in the generator's update of given steps (from 0)."""
    update = trainer.generator_step

    def choose(sent: dict[int, list[int]]) -> None:
        def sending(step, *arguments):
            for number in sent.get(step, []):
                signal.raise_signal(number)
            return update(step, *arguments)

        monkeypatch.setattr(trainer, "generator_step", sending)

    return choose


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(tiny, tiny_run, tmp_path, signals_at, capfd, number):
    """Sent twice at once, as `timeout` and `torchrun` do. What follows gives the weights of the whole run."""
    whole = train(tiny, replace(tiny_run, out=str(tmp_path / "whole")), progress=False)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    run = replace(tiny_run, checkpoint_every=100, log_every=100)
    signals_at({2: [number, number]})
    said = r"stopped after step 3\. Last good checkpoint: .*step-00000003; --resume latest goes on from it$"
    with pytest.raises(Interrupted, match=said) as caught:
        train(tiny, run, progress=False)
    assert caught.value.status == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    name = signal.Signals(number).name
    assert (
        capfd.readouterr().err == f"\n{name}: stopping after this step, with a checkpoint. Once more stops at once.\n"
    )
    out = Path(run.out)
    assert [line["step"] for line in logs.read(out)] == [3] and (out / "curves.png").exists()
    signals_at({})
    assert same_weights(whole, train(tiny, replace(run, resume="latest"), progress=False))


def test_a_signal_in_the_last_step_changes_nothing(tiny, tiny_run, signals_at):
    signals_at({5: [signal.SIGINT]})
    assert train(tiny, tiny_run, progress=False).name == "step-00000006"


def test_a_second_signal_stops_at_once(tiny, tiny_run, signals_at, monkeypatch):
    monkeypatch.setattr(interrupt, "REPEATED", -1.0)
    signals_at({3: [signal.SIGINT, signal.SIGINT]})
    with pytest.raises(Interrupted, match=r"stopped at once\. Last good checkpoint: .*step-00000002; --resume"):
        train(tiny, tiny_run, progress=False)
    with pytest.raises(Interrupted, match=r"at once\. Last good checkpoint: none; --resume latest starts afresh"):
        train(tiny, replace(tiny_run, out=tiny_run.out + "-new", checkpoint_every=100), progress=False)


def test_interrupted_before_the_first_step(tiny, tiny_run, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(monitor, "generate", interrupted)
    with pytest.raises(Interrupted, match=r"at once.*none") as caught:
        train(tiny, tiny_run, progress=False)
    assert caught.value.status == 130


def test_the_command_says_so(tmp_path, signals_at, capsys):
    signals_at({1: [signal.SIGTERM]})
    out = str(tmp_path / "run")
    assert main(["train", *SMALL, "--steps", "3", "--out", out]) == 143
    said = r"stopped after step 2\. Last good checkpoint: \S+step-00000002; --resume latest goes on from it\n$"
    assert re.search(said, capsys.readouterr().err)
    assert main(["train", *SMALL, "--steps", "3", "--out", out, "--resume", "latest"]) == 0


def test_ignored_signals_stay_ignored_and_other_threads_have_none():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals(announce=False) as stop:
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert stop.received is None
    finally:
        signal.signal(signal.SIGINT, before)

    def enter() -> None:
        with StopSignals(announce=False):
            found.append(signal.getsignal(signal.SIGTERM))

    found: list = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def wait_for(run: Path, lines: int, alive: Callable[[], bool], seconds: float = 240) -> None:
    """Until the run's log has that many lines."""
    path, deadline = run / "log.jsonl", time.monotonic() + seconds
    while not (path.exists() and path.read_text().count("\n") >= lines):
        assert alive() and time.monotonic() < deadline
        time.sleep(0.05)


ENDLESS = ["train", *SMALL, "--steps", "100000", "--log-every", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group(tmp_path, number):
    """As a terminal sends it: processes that load images are not stopped by it, and the step gets its batch."""
    out = tmp_path / "run"
    with processes.gans(*ENDLESS, "--images.workers", "2", "--out", str(out), errors=tmp_path / "errors") as process:
        wait_for(out, 3, process.is_alive)
        os.killpg(process.pid, number)
        process.join(120)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 128 + number, errors
    assert "Traceback" not in errors
    (path,) = checkpoint.list_checkpoints(out / "checkpoints")
    assert f"stopped after step {checkpoint.step_of(path)}. Last good checkpoint: {path};" in errors
    assert logs.read(out)[-1]["step"] == checkpoint.load_state(path)["step"] == checkpoint.step_of(path)


def stopped_together(out: Path, errors: str) -> None:
    """By several processes, of which one says so; one alone can go on."""
    (path,) = checkpoint.list_checkpoints(out / "checkpoints")
    assert f"stopped after step {checkpoint.step_of(path)}. Last good checkpoint: {path};" in errors
    assert errors.count("stopped after step") == 1
    steps = str(checkpoint.step_of(path) + 1)
    assert main(["train", *SMALL, "--steps", steps, "--out", str(out), "--resume", "latest"]) == 0


@pytest.mark.slow
def test_a_signal_to_torchrun(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gans"]
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *ENDLESS, "--out", str(out)], env=environment, **options)
    try:
        wait_for(out, 3, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    stopped_together(out, errors)


@pytest.mark.slow
def test_a_signal_to_one_of_several_processes(tmp_path):
    out = tmp_path / "run"
    with processes.several(2, *ENDLESS, "--out", str(out), errors=tmp_path) as (main_process, other):
        wait_for(out, 3, main_process.is_alive)
        os.kill(other.pid, signal.SIGTERM)
        for process in (main_process, other):
            process.join(240)
            assert process.exitcode == 128 + signal.SIGTERM
    stopped_together(out, "".join((tmp_path / rank).read_text() for rank in "01"))


def test_the_lock_of_a_folder(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a" / "b"
    with locked(folder):
        with pytest.raises(FileExistsError, match=f"'{folder}' is in use by process {os.getpid()} on"), locked(folder):
            pass
        with locked(tmp_path):
            pass
    link = tmp_path / "link"
    link.symlink_to(folder)
    with locked(link), pytest.raises(FileExistsError, match="in use"), locked(folder):
        pass

    def unsupported(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with locked(folder):
        pass
    assert "cannot be locked ([Errno 38] Function not implemented): do not start a second" in capsys.readouterr().err


def test_a_refused_run_leaves_nothing(tiny, tiny_run, tmp_path, folder, monkeypatch):
    """Neither an empty folder nor a number that the next run would have had, whatever it was refused for."""
    monkeypatch.chdir(tmp_path)
    (folder / "broken.png").write_bytes(b"none")
    out = next_folder(RUNS, "tiny", tiny_run)
    run = replace(tiny_run, out=str(out), data=str(folder), sample_count=16)
    many = replace(tiny, **{name: replace(getattr(tiny, name), classes=3) for name in ("generator", "discriminator")})
    for recipe, settings, error in (
        (tiny, replace(run, init="nowhere"), FileNotFoundError),
        (tiny, run, BrokenImageError),
        (tiny, replace(run, data="digits", metric_every=1, metric="judge:nowhere"), OSError),
        (many, replace(run, data="digits"), ValueError),
    ):
        with pytest.raises(error):
            train(recipe, settings, progress=False)
        assert not RUNS.exists() and next_folder(RUNS, "tiny", tiny_run) == out
    options = ["--preset", "digits", "--device", "cpu", "--threads", "1"]
    assert main(["train", *options, "--data", "digits", "--init", "nowhere"]) == 1  # by a folder that it numbers itself
    assert not RUNS.exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(BrokenImageError):
        train(tiny, replace(run, out="mine/run"), progress=False)
    assert (tmp_path / "mine").is_dir() and not (tmp_path / "mine" / "run").exists()


def test_the_demo_deletes_a_run_of_its_own_only(tmp_path):
    mine = tmp_path / "run" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(FileExistsError, match=r"run is not a run of this demo; give another --out"):
        demo(["--out", str(tmp_path)])
    other = tmp_path / "other"
    with locked(other / "run"), pytest.raises(FileExistsError, match="in use"):
        demo(["--out", str(other)])
    assert mine.read_text() == "years of work" and (other / "run").exists()
