"""The tuner of the triton backend (benchmarks.kernels.triton_tune), without a GPU."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.operators.interpreter import python_without_interpreter

pytest.importorskip("triton")

from benchmarks.kernels import triton_tune as tune
from benchmarks.shapes import SHAPES
from natten_ext.backends.triton import configs

ROOT = Path(__file__).parents[2]


def task(config: tuple[int, ...], step: str = "forward", shape: str = "nat-16") -> tune.Task:
    return tune.Task(step, "bfloat16", (shape,), configs.Config(*config), "cpu")


SECONDS = 2.0


@pytest.fixture
def quick_processes(monkeypatch):
    """Processes that start as copies of one that has imported this module, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    monkeypatch.setattr(tune, "get_context", lambda how: context)


def ends_the_process(one: tune.Task, arch: str = "") -> str:
    if one.config.block == 128:
        time.sleep(100 * SECONDS)
    while one.config.block == 64:
        pass  # with the interpreter locked
    if one.config.own == 32:
        os._exit(3)
    if one.config.own == 128:
        raise RuntimeError("an illegal address\nwas met")
    return ""


def test_the_fastest_of_those_that_are_right_is_written_and_read(tmp_path, monkeypatch):
    """The one in use is among them, first, and what the compiler does not like is not run."""
    monkeypatch.setattr(configs, "architecture", lambda device: configs.state.assumed)
    path = tmp_path / "configs.json"
    shared = configs.read()
    configs.write({"default": shared["default"]}, path)
    read = configs.read
    monkeypatch.setattr(configs, "read", lambda path=path: read(path))
    configs._lookup.cache_clear()
    key = "neighborhood", torch.bfloat16, True, 32

    def in_use(step: str) -> configs.Config:
        with configs.assumed_architecture("sm_90"):
            return configs.lookup(torch.device("cpu"), step, *key)

    before = {step: in_use(step) for step in ("forward", "backward_key", "table")}
    seen: list[tune.Task] = []
    fastest, wrong, broken, spilling = ((64, 32, 4, 1), (32, 16, 2, 1), (32, 16, 2, 2), (32, 32, 2, 1))

    def run(one: tune.Task) -> tune.Measured | str:
        seen.append(one)
        if one.config[:4] == broken:
            return "it ended the process"
        times = {fastest: 1.0, wrong: 0.5}
        return tune.Measured(times.get(one.config[:4], 2.0), 1.0 if one.config[:4] == wrong else 1e-3)

    lines: list[str] = []
    try:
        tune.tune(
            [SHAPES["nat-16"]], ["bfloat16"], ["forward", "backward_key", "table"], "sm_90", path, "cuda",
            lambda tasks: [one for one in tasks if one.config[:4] != spilling], run, report=lines.append,
        )  # fmt: skip
        table = configs.read()
        assert table["default"] == shared["default"]
        assert table["sm_90"] == {f"{step}/neighborhood/half/32": [*fastest, 0] for step in before}
        assert {step: in_use(step) for step in before} == dict.fromkeys(before, configs.Config(*fastest))
    finally:
        configs._lookup.cache_clear()
    for step, config in before.items():
        tried = [one.config for one in seen if one.step == step]
        assert tried[0] == config and len(tried) == len(set(tried)) >= 20
        assert configs.Config(*spilling) not in tried
    text = "\n".join(lines)
    assert text.count("it ended the process") == 3 and text.count("differ by 1.0e+00") == 3


def test_it_stops_when_its_time_is_over(tmp_path):
    path = tmp_path / "configs.json"
    configs.write(configs.read(), path)
    before, lines = path.read_text(), []
    arguments = [SHAPES["nat-16"]], ["bfloat16"], ["forward"], "sm_90", path, "cuda", lambda tasks: tasks
    tune.tune(*arguments, lambda one: pytest.fail("it ran"), -1, lines.append)
    assert "minutes are over" in lines[0] and path.read_text() == before


def test_by_default_it_tunes_what_fits_ten_minutes():
    """Three steps of three classes, of which one has no table: a few seconds to compile each on the cores of a GPU's
    host, and less to run."""
    tasks = [
        tune.tasks_of(step, "bfloat16", group, channels, "sm_90", "cuda")
        for (_, channels), group in tune.classes([SHAPES[name] for name in tune.DEFAULT_SHAPES], torch.bfloat16).items()
        for step in tune.DEFAULT_STEPS
    ]
    assert sum(bool(group) for group in tasks) == 8
    assert sum(map(len, tasks)) <= 8 * 34
    assert {128} < {one.config.block for group in tasks for one in group}


@pytest.mark.slow
def test_what_ends_its_process_is_left_out_and_the_rest_goes_on(quick_processes):
    lines: list[str] = []
    tasks = [task((own, 16, 4, 1)) for own in (16, 32, 64, 128)]
    assert tune.compiled(tasks, "sm_90", 2, lines.append, trouble=ends_the_process) == [tasks[0], tasks[2]]
    assert sorted(lines) == [
        "  (128, 16, 4, 1, 0) is left out: RuntimeError: an illegal address",
        "  (32, 16, 4, 1, 0) is left out: the compiler crashed",
    ]
    runner = tune.Runner(ends_the_process)
    try:
        found = [runner(one) for one in tasks]
    finally:
        runner.close()
    assert found == ["", "it ended the process", "", "RuntimeError: an illegal address"]


@pytest.mark.slow
def test_what_does_not_end_is_ended_and_the_rest_goes_on(quick_processes):
    lines: list[str] = []
    locked, waiting, fine = (task((16, block, 4, 1)) for block in (64, 128, 16))
    assert tune.compiled([locked, fine], "sm_90", 1, lines.append, SECONDS, ends_the_process) == [fine]
    assert lines == ["  (16, 64, 4, 1, 0) is left out: not done after 2 s"]
    runner = tune.Runner(ends_the_process, SECONDS)
    try:
        assert [runner(one) for one in (waiting, fine)] == ["not done after 2 s", ""]
    finally:
        runner.close()


@pytest.mark.slow
def test_what_spills_is_left_out():
    """Compiled for sm_80, in processes that do not interpret."""
    code = (
        "from benchmarks.kernels import triton_tune as tune\n"
        "from natten_ext.backends.triton.configs import Config\n"
        "if __name__ == '__main__':\n"
        "    tasks = [tune.Task('backward_key', 'bfloat16', ('church-g4',), Config(64, block, 4, 1), 'cuda')\n"
        "             for block in (16, 64)]\n"
        "    print([tuple(one.config) for one in tune.compiled(tasks, 'sm_80', 1, print)])\n"
    )
    done = python_without_interpreter("-c", code)
    assert done.returncode == 0, done.stderr
    spills, kept = done.stdout.splitlines()
    assert spills.startswith("  (64, 64, 4, 1, 0) is left out: spills") and kept == "[(64, 16, 4, 1, 0)]"


@pytest.mark.slow
@pytest.mark.parametrize("step", ["forward", "backward_key", "table", "double_table"])
def test_results_are_compared_with_those_of_the_configuration_in_use(step, monkeypatch):
    """Interpreted."""
    if not tune.plans.INTERPRETED:
        pytest.skip("measured on the GPU")
    tiny = replace(SHAPES["nat-16"], name="tiny", batch=1, size=(4, 5), window=3, dilations=(1,), heads=1, head_dim=4)
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    tune._problem.cache_clear()
    one = tune.Task(step, "float32", ("tiny",), configs.Config(16, 16, 1, 1), "cpu")
    measured = tune.measure(one)
    assert measured.milliseconds > 0 and measured.difference < tune.TOLERANCE["float32"]
    order, arguments, expected = tune._problem(step, "float32", "tiny", "cpu")
    wrong = [None if x is None else 2 * x for x in expected]
    monkeypatch.setattr(tune, "_problem", lambda *of: (order, arguments, wrong))
    assert tune.measure(one).difference == pytest.approx(0.5, rel=1e-3)
