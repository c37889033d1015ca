"""gpu_check as a whole: parts that fail, hang or don't fit, a run that is killed, and everything in small on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check, tools
from benchmarks.gpu import parts
from benchmarks.gpu.child import OUT_OF_TIME, ROOT, Ended, run_limited
from benchmarks.gpu.parts import FAILED, NOT_RUN, OK, PARTS, Part, Run


def result(folder: Path) -> dict:
    return json.loads((folder / "gpu_check.json").read_text())


def environment(run):
    run.found["backends"] = ["triton"]
    run.document.data["commit"] = "abc"
    return OK


def good(run):
    run.found["summary"] = "all good"
    return OK


def raises(run):
    run.found["failures"] = ["half of it was fine"]
    raise RuntimeError("broken part")


def hangs(run):
    ended = run_limited([sys.executable, "-c", "import time; time.sleep(600)"], run.left, run.folder / "x.log")
    return OUT_OF_TIME if ended.status is None else OK


def fake(name, run, share=1.0, least=0.0, needs_backend=True):
    return Part(name, run, share, least, needs_backend)


ENVIRONMENT = fake("environment", environment, needs_backend=False)


@pytest.fixture
def check(tmp_path):
    def run(*parts, minutes=0.2, arguments=()):
        names = {part.name for part in PARTS}
        assert all(part.name in names for part in parts)
        chosen = ",".join(part.name for part in parts)
        options = ["--out", str(tmp_path), "--minutes", str(minutes), "--parts", chosen, *arguments]
        return gpu_check.main(options, (ENVIRONMENT, *parts)), result(tmp_path)

    return run


def test_a_part_that_fails_takes_none_along(check, tmp_path, capsys):
    status, data = check(fake("build", raises), fake("tests", good))
    assert status == 1
    build, tests = data["parts"]["build"], data["parts"]["tests"]
    assert (build["status"], build["reason"]) == (FAILED, "RuntimeError: broken part")
    assert (tests["status"], tests["summary"]) == (OK, "all good")
    assert data["finished"]
    assert "half of it was fine" in (tmp_path / "gpu_check.md").read_text()
    assert "Traceback" in (tmp_path / "gpu_check.log").read_text()
    assert "build: failed; RuntimeError: broken part" in capsys.readouterr().out


def test_a_part_that_hangs_gets_its_share_alone(check):
    begin = time.monotonic()
    status, data = check(fake("tests", hangs), fake("bench", good), minutes=0.15)
    assert time.monotonic() - begin < 60  # not the 600 s of what hangs
    tests = data["parts"]["tests"]
    assert (tests["status"], tests["reason"]) == (
        OUT_OF_TIME,
        f"its {tests['limit']:.0f} s were over before all was done",
    )
    assert tests["limit"] <= 2.6  # half of what is left of nine seconds less the reserve
    assert data["parts"]["bench"]["status"] == OK
    assert status == 0


def test_parts_that_do_not_fit_are_listed(check):
    _, data = check(fake("tests", good, least=5), fake("bench", good, least=100), minutes=0.2)
    assert data["parts"]["tests"]["status"] == OK
    assert (data["parts"]["bench"]["status"], data["parts"]["bench"]["reason"]) == (NOT_RUN, OUT_OF_TIME)


def test_without_a_backend_there_is_nothing_to_check(tmp_path):
    blind = fake("environment", lambda run: FAILED, needs_backend=False)
    arguments = ["--out", str(tmp_path), "--parts", "tests"]
    assert gpu_check.main(arguments, (blind, fake("tests", good))) == 1
    assert "no backend of ours can run on cuda" in result(tmp_path)["parts"]["tests"]["reason"]
    assert gpu_check.main([*arguments, "--backend", "cuda"], (blind, fake("tests", good))) == 1
    assert result(tmp_path)["parts"]["tests"]["status"] == OK


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "tests,dance"], "got 'dance'"),
        (["--minutes", "0"], "--minutes must be more than 0, got 0"),
        (["--device", "cuda:1"], "--device must be cuda or cpu, got 'cuda:1' (CUDA_VISIBLE_DEVICES"),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--shape", "nat-7"], "invalid choice: 'nat-7'"),
        (["--precision", "float64"], "invalid choice: 'float64'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.parse(["--out", str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


KILLED = """
import sys, time
from benchmarks import gpu_check
from benchmarks.gpu.child import run_limited
from benchmarks.gpu.parts import OK, Part

def environment(run):
    run.found["backends"] = ["triton"]
    return OK

def bench(run):
    run.document.data["rates"] = {"bfloat16": {"fmas": 1.0, "exps": 1.0, "bytes": 1.0}}
    run.document.save()
    run_limited([sys.executable, "-c", "import time; time.sleep(600)"], 600, run.folder / "x.log")
    return OK

parts = Part("environment", environment, 1, 0, False), Part("bench", bench, 1, 0)
sys.exit(gpu_check.main(["--out", sys.argv[1], "--parts", "bench"], parts))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_keeps_what_it_measured(how, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (tmp_path / "gpu_check.json").exists() and result(tmp_path)["rates"]:
            break
        time.sleep(0.02)
    os.kill(process.pid, how)
    process.wait()
    data = result(tmp_path)
    assert data["rates"]["bfloat16"]["bytes"] == 1.0
    assert not data["finished"]
    assert "This run did not end" in (tmp_path / "gpu_check.md").read_text()
    if how == signal.SIGTERM:
        assert process.returncode == 130
        assert (data["parts"]["bench"]["status"], data["parts"]["bench"]["reason"]) == (FAILED, "interrupted")


FAILING_TESTS = """
import os, pytest, torch
import natten_ext

@pytest.mark.parametrize("number", range(3))
def test_passes(target, number):
    assert target.device == "cpu"

def test_fails(target):
    assert 1 == 2, "one is not two"

def test_skips(target):
    pytest.skip("no reason")

def test_takes_the_process_along(target):
    os.abort()

def test_after_that(target):
    pass

def test_of_no_backend():
    raise RuntimeError("not an operator test")
"""

FAKE_SANITIZER = """#!/bin/sh
# compute-sanitizer --tool NAME --error-exitcode N --report-api-errors no --target-processes X COMMAND...
tool=$2; shift 8
if [ $tool = memcheck ]; then "$@" || exit $?; echo "========= ERROR SUMMARY: 0 errors"; exit 0; fi
echo "========= Error: Race reported between Write access and Read access"
echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"; exit 86
"""


def test_everything_in_small_on_a_cpu(tmp_path, monkeypatch):
    """All real parts but the build, with a test-suite that has failures and a sanitizer that finds something."""
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "test_made_up.py").write_text(FAILING_TESTS)
    (suite / "test_not_python.py").write_text("def (")
    conftest = (ROOT / "tests" / "natten_ext" / "conftest.py").read_text()
    helpers = str(ROOT / "tests" / "natten_ext")
    (suite / "conftest.py").write_text(
        conftest.replace("import os\n", f"import os, sys\nsys.path[:0] = [{helpers!r}]\n")
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text(FAKE_SANITIZER)
    (tools / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--out", str(tmp_path / "out"), "--device", "cpu", "--minutes", "12", "--processes", "1",
                 "--parts", "tests,repeat,sanitizer,bench", "--backend", "cpu", "--precision", "float32",
                 "--shape", "cifar-d2", "--tests", str(suite)]  # fmt: skip
    assert gpu_check.main(arguments) == 1
    data = result(tmp_path / "out")
    assert data["finished"]
    assert data["environment"]["torch"] and data["backends"]["float32"]["cpu"] == ""

    tests = data["parts"]["tests"]
    counts = {"collected": 7, "passed": 4, "failed": 2, "skipped": 1, "lost": 1, "not_run": 0}
    assert tests["backends"]["cpu"] == counts  # of the seven operator tests; one failure is the file that is not Python
    assert any("one is not two" in failure for failure in tests["failures"])
    assert any("along[cpu-on-cpu]: killed by SIGABRT: Fatal Python error" in f for f in tests["failures"])

    repeat = data["parts"]["repeat"]
    assert repeat["status"] == OK
    assert repeat["results"][0][:3] == ["repeat", "cpu", "float32"]

    sanitizer = data["parts"]["sanitizer"]
    assert sanitizer["status"] == FAILED
    assert sanitizer["tools"]["memcheck, cpu"]["problems"] == 0
    assert sanitizer["tools"]["racecheck, cpu"]["problems"] == 2
    assert sanitizer["failures"] == [
        "racecheck, cpu: 2 problems; first: Error: Race reported between Write access and Read access"
    ]

    assert data["parts"]["bench"]["status"] == OK
    rows = {(row["order"], row["candidate"]): row for row in data["rows"]}
    assert {order for order, _ in rows} == {"forward", "backward", "double"}
    for order in ("forward", "backward", "double"):
        row = rows[order, "cpu"]
        assert (row["status"], row["precision"], row["pass"]) == ("ok", "float32", "quick")
        assert row["alone"] > 0 and row["alone_percent"] > 0 and row["median"] > 0
        assert rows[order, "sdpa-math"]["status"] == "ok"
    assert set(data["rates"]) == {"float32"}
    assert data["cells_not_run"] == []
    page = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "| cifar-d2 | forward | cpu " in page


@pytest.mark.parametrize("loads", [True, False])
def test_kernels_that_do_not_load_are_built_again(monkeypatch, tmp_path, loads):
    """A library that is there but does not load is no reason not to build: importing the package does not load it."""
    commands = []

    def run_limited(command, limit, log, environment=None):
        commands.append(" ".join(command))
        return Ended(1 if "_not_loaded" in commands[-1] and not loads else 0, 0.0, "")

    monkeypatch.setattr(parts, "run_limited", run_limited)
    monkeypatch.setattr(parts.shutil, "which", lambda name: name)
    run = Run("cuda", [], [], None, tmp_path, time.monotonic() + 60, False, "gpu", None, [], 1, [])
    assert parts.build(run) == OK
    assert any("build_ext" in command for command in commands) == (not loads)


def test_nvidia_smi_is_asked_about_the_visible_gpu(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in --id=3) echo "700 MHz, 9.0";; *) echo "500 MHz, 8.0"; echo "1 MHz, 7.0";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert tools.nvidia_smi("clocks.max.sm", "compute_cap") == ["500 MHz", "8.0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert tools.nvidia_smi("clocks.max.sm", "compute_cap") == ["700 MHz", "9.0"]
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tools.nvidia_smi("compute_cap") == []
