"""gpu_check: stages that fail, hang or don't fit, a run that is killed, and everything in small on a CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import setup
from benchmarks import gpu_check, tools
from benchmarks.gpu import stages as real
from benchmarks.gpu.processes import OUT_OF_TIME, ROOT, Process
from benchmarks.gpu.stages import NotRunError
from benchmarks.problem import ORDERS
from benchmarks.record import Record


def load(run, stage):
    run.backends[:] = ["triton"]


def good(run, stage):
    stage.entry["summary"] = "all good"


def raises(run, stage):
    stage.fail("half of it", "was fine")
    raise RuntimeError("broken stage")


def hangs(run, stage):
    process = Process([sys.executable, "-c", "import time; time.sleep(600)"], run.logs / "x.log")
    stage.fail("sleeper", process.wait(stage.deadline - time.monotonic()).reason)


def cannot(run, stage):
    raise NotRunError("no such tool")


@pytest.fixture
def check(tmp_path):
    def run(minutes=1, load=load, **stages):
        made = {"load": (load, 60), **{name: (work, 60) for name, work in stages.items()}}
        arguments = ["--out", str(tmp_path), "--minutes", str(minutes), "--stages", ",".join(stages)]
        return gpu_check.main(arguments, made), Record.read(tmp_path / "gpu_check.json").more["stages"]

    return run


def test_a_stage_that_fails_takes_none_along(check, tmp_path):
    status, stages = check(contact=raises, counters=cannot, tests=good)
    assert status == 1
    assert (stages["contact"]["status"], stages["contact"]["reason"]) == ("failed", "RuntimeError: broken stage")
    assert (stages["counters"]["status"], stages["counters"]["reason"]) == ("not run", "no such tool")
    assert (stages["tests"]["status"], stages["tests"]["summary"]) == ("ok", "all good")
    assert "- contact: half of it: was fine" in (tmp_path / "gpu_check.md").read_text()


def test_what_hangs_is_ended_and_what_does_not_fit_is_listed(check):
    begin = time.monotonic()
    status, stages = check(minutes=0.1, tests=hangs, peers=good)
    assert time.monotonic() - begin < 60  # not the 600 s of what hangs
    assert (stages["tests"]["status"], stages["tests"]["reason"]) == (OUT_OF_TIME, "out of time: sleeper")
    assert (stages["peers"]["status"], stages["peers"]["reason"]) == ("not run", OUT_OF_TIME)
    assert status == 0


def test_without_a_backend_there_is_nothing_to_check(check):
    _, stages = check(load=good, tests=good)
    assert stages["tests"] == {"status": "not run", "reason": "no backend of ours can run on cuda"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "tests,dance"], "got 'dance'"),
        (["--minutes", "0"], "--minutes must be more than 0, got 0"),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--device", "cuda:1"], "invalid choice: 'cuda:1'"),
        (["--shape", "nat-7"], "invalid choice: 'nat-7'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.parse(["--out", str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


KILLED = """
import sys
from benchmarks import gpu_check
from benchmarks.gpu.processes import Process

def load(run, stage):
    run.backends[:] = ["triton"]

def peers(run, stage):
    stage.entry["summary"] = "half"
    process = Process([sys.executable, "-c", "import time; time.sleep(600)"], run.logs / "x.log")
    run.record.environment["sleeper"] = process._process.pid
    run.save()
    process.wait(600)

sys.exit(gpu_check.main(["--out", sys.argv[1], "--stages", "peers"], {"load": (load, 60), "peers": (peers, 600)}))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_keeps_what_it_found(how, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, start_new_session=True)
    file, deadline = tmp_path / "gpu_check.json", time.monotonic() + 60
    while time.monotonic() < deadline and not (file.exists() and Record.read(file).environment):
        time.sleep(0.02)
    os.kill(process.pid, how)
    process.wait()
    record = Record.read(file)
    stage, sleeper = record.more["stages"]["peers"], record.environment["sleeper"]
    assert (stage["summary"], record.more["finished"]) == ("half", False)
    assert "This run did not end" in (tmp_path / "gpu_check.md").read_text()
    if how == signal.SIGTERM:
        assert (process.returncode, stage["status"], stage["reason"]) == (130, "failed", "interrupted")
        assert not Path(f"/proc/{sleeper}").exists()
    else:
        os.kill(sleeper, signal.SIGKILL)


def test_how_a_process_ended(tmp_path):
    def run(program, seconds=60):
        return Process([sys.executable, "-c", program], tmp_path / "log").wait(seconds)

    assert run("print('fine')").reason == ""
    assert run("print('last words'); raise SystemExit(7)").reason == "exit status 7: last words"
    assert run("import os; os.abort()").reason == "killed by SIGABRT: (no output)"
    # Interrupted first, so that it can write down what it has; all that it started ends with it.
    program = "import subprocess, sys\np = subprocess.Popen(['sleep', '600'])\nprint(p.pid, flush=True)\n"
    ended = run(program + "try: p.wait()\nexcept KeyboardInterrupt: print('written', flush=True)", 2)
    assert (ended.status, ended.reason) == (None, OUT_OF_TIME)
    if ended.output:  # this machine was quick enough to start Python
        pid, last = ended.output.split()
        assert last == "written"
        deadline = time.monotonic() + 10
        while (path := Path(f"/proc/{pid}/stat")).exists() and path.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline


SUITE = """
import os, pytest, torch

@pytest.mark.parametrize("number", range(3))
def test_passes(target, number):
    assert target.device == "cpu"

def test_fails(target):
    assert 1 == 2, "one is not two"

def test_skips(target):
    pytest.skip("no reason")

def test_takes_the_process_along(target):
    os.abort()

def test_breaks_the_context(target, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access")
    torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), broken
    raise RuntimeError("illegal access")

def test_after_that(target):
    assert not torch.cuda.is_initialized()

def test_hangs(target):
    import time
    time.sleep(600)

def test_of_no_backend():
    raise RuntimeError("not an operator test")

@pytest.mark.gpu
def test_on_a_gpu(target):
    pass
"""

TOOLS = {
    # compute-sanitizer --tool NAME --error-exitcode N --report-api-errors no --target-processes X COMMAND...
    "compute-sanitizer": """#!/bin/sh
tool=$2; shift 8
if [ $tool = memcheck ]; then "$@" || exit $?; echo "========= ERROR SUMMARY: 0 errors"; exit 0; fi
echo "========= Error: Race reported between Write access and Read access"
echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"; exit 86
""",
    # Two launches of one kernel; the second stands outside of the range that names the shape.
    "ncu": """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
cat > "$2" <<'END'
==PROF== Connected
"ID","Kernel Name","Grid Size","NVTX","smsp__inst_executed.sum","gpu__time_duration.sum"
"","","","","inst","ns"
"0","Forward","(8, 1, 1)","shape=nat-256","1,234","5000"
"1","Forward","(4, 1, 1)","","10","2500"
END
""",
}


def test_everything_in_small_on_a_cpu(tmp_path, monkeypatch):
    """All stages, with a test-suite that has failures of every kind, and tools that are made up."""
    suite, bin_ = tmp_path / "suite", tmp_path / "bin"
    suite.mkdir()
    bin_.mkdir()
    (suite / "test_made_up.py").write_text(SUITE)
    (suite / "test_not_python.py").write_text("def (")
    (suite / "conftest.py").write_text('pytest_plugins = ["tests.conftest", "tests.operators.conftest"]')
    for name, text in TOOLS.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("benchmarks.gpu.stages.TEST_LIMIT", 3)
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--device", "cpu", "--minutes", "12", "--processes", "1", "--backend", "cpu",
                 "--peers", "naive,sdpa", "--tests", str(suite), "--dtype", "bfloat16"]  # fmt: skip
    assert gpu_check.main(arguments) == 1
    record = Record.read(out / "gpu_check.json")
    assert record.precision == json.loads((out / "logs/check-cpu-cifar-d2.json").read_text())["precision"] == "bfloat16"
    stages = record.more["stages"]
    assert record.more["finished"] and record.environment["torch"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "load": "ok", "contact": "ok", "counters": "ok", "sanitizer": "failed", "tests": "failed", "repeat": "failed",
        "peers": "ok",
    }  # fmt: skip

    assert stages["tests"]["found"]["cpu"] == {"passed": 4, "failed": 5, "skipped": 1}
    failures = "\n".join(stages["tests"]["failures"])
    for told in ("fails.*one is not two", "along.*crashed", "context.*illegal access", "hangs.*crashed", "not_python"):
        assert re.search(told, failures), told
    assert "no backend" not in failures
    assert stages["repeat"]["found"]["cpu"] == {"passed": 1, "failed": 1}  # the file that is not Python

    assert stages["sanitizer"]["found"]["cpu"] == {"memcheck errors": 0, "racecheck hazards": 2}
    assert stages["sanitizer"]["failures"] == [
        "cpu, 2 racecheck hazards: Error: Race reported between Write access and Read access"
    ]
    launches = json.loads((out / "counters.json").read_text())["launches"]
    assert [(launch["shape"], launch["instructions"]) for launch in launches] == [("nat-256", 1234), ("nat-256", 10)]

    for order in ("forward", "backward", "double"):
        cell = record.cells["cifar-d2", order]
        assert cell["cpu"].status == "ok" and cell["cpu"].alone_percent > 0 and cell["cpu"].ratio > 0
        assert cell["sdpa-math"].status == "ok"
    assert "| cifar-d2 | forward | cpu " in (out / "gpu_check.md").read_text()


def test_a_backend_that_breaks_costs_its_own_orders_alone(tmp_path, monkeypatch):
    """A process that dies in the double backward: what it checked before is timed, and the other backend's all."""

    monkeypatch.setattr(real, "CHECK_THEN_TIME", FAKE_BENCH + real.CHECK_THEN_TIME.replace(IMPORT, ""))

    def load(run, stage):
        run.backends[:] = ["cuda", "triton"]

    arguments = ["--out", str(tmp_path / "out"), "--stages", "contact", "--shape", "nat-64"]
    assert gpu_check.main(arguments, {"load": (load, 60), "contact": (real.contact, 60)}) == 1
    record = Record.read(tmp_path / "out" / "gpu_check.json")
    timed = {(row.candidate, row.order) for row in record.rows if row.timing}
    before = ORDERS[: ORDERS.index("double")]
    assert timed == {*(("cuda", order) for order in ORDERS), *(("triton", order) for order in before)}
    (failure,) = record.more["stages"]["contact"]["failures"]
    assert failure.startswith("triton on nat-64, double: killed by SIGSEGV")


def test_matmul_is_timed_where_it_may_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "CHECK_THEN_TIME", FAKE_BENCH + real.CHECK_THEN_TIME.replace(IMPORT, ""))

    def timed(dtype, shape, *more):
        out = str(tmp_path / f"{dtype}{shape}{len(more)}")
        arguments = ["--out", out, "--stages", "contact", "--dtype", dtype, "--shape", shape, *more]
        gpu_check.main(arguments, {"load": (load, 60), "contact": (real.contact, 60)})
        return {row.candidate for row in Record.read(Path(out) / "gpu_check.json").rows}

    assert timed("float32", "nat-64") == timed("float32", "cifar-d1", "--backend", "triton") == {"triton"}
    assert timed("float32", "cifar-d1") == {"triton", "matmul"}
    assert timed("bfloat16", "cifar-d1") == {"triton"}


IMPORT = "from benchmarks.attn_bench import main"
FAKE_BENCH = """
import os
from pathlib import Path
from benchmarks.floors import Rates
from benchmarks.record import Record, Row
from benchmarks.shapes import SHAPES
from benchmarks.timing import Timing
def main(arguments):
    given = lambda name: [arguments[i + 1] for i, word in enumerate(arguments) if word == name]
    (path,), (backend,) = given("--json"), given("--backend")
    check, record = given("--repeats")[-1] == "0", Record({}, "bfloat16")
    for order in given("--order"):
        if order == "double" and backend == "triton":
            os.kill(os.getpid(), 11)
        timing = {} if check else {"timing": Timing([1e-3])}
        record.add([Row(SHAPES["nat-64"], order, backend, "ours", **timing)], Rates(1e14, 1e12, 1e12))
        record.write(Path(path))
"""


def test_tests_that_take_too_long_are_counted_as_far_as_they_went(tmp_path):
    slow = "import pytest, time\n@pytest.mark.parametrize('n', range(400))\ndef test_x(target, n): time.sleep(0.5)\n"
    (tmp_path / "test_slow.py").write_text(slow)
    (tmp_path / "conftest.py").write_text(
        "import pytest\n@pytest.fixture(params=['cpu-on-cpu'])\ndef target(request): pass\n"
    )
    options = ["--out", str(tmp_path / "out"), "--device", "cpu", "--processes", "2", "--tests", str(tmp_path)]

    def load(run, stage):
        run.backends[:] = ["cpu"]

    seconds = real.TEST_END + 24  # pytest starts within it on a busy machine too; all tests take 100
    gpu_check.main([*options, "--stages", "tests"], {"load": (load, 60), "tests": (real.tests, seconds)})
    stage = Record.read(tmp_path / "out" / "gpu_check.json").more["stages"]["tests"]
    assert stage["status"] == OUT_OF_TIME, stage
    assert sum(stage["found"]["cpu"].values()) == 400  # passed and not run, or none passed in time


def test_the_sanitizer_watches_every_cuda_kernel_without_torch(tmp_path, monkeypatch):
    """And says so where the program is not there."""
    assert real.EVERY_KERNEL == setup.EVERY_KERNEL

    def load(run, stage):
        run.backends[:] = ["cuda"]

    def check(name: str) -> dict:
        options = ["--out", str(tmp_path / name), "--stages", "sanitizer"]
        gpu_check.main(options, {"load": (load, 60), "sanitizer": (real.sanitizer, 60)})
        return Record.read(tmp_path / name / "gpu_check.json").more["stages"]["sanitizer"]

    program = '#!/bin/sh\necho "x, 5 channels, float32: output is off"\nexit 1'
    for name, text in {**TOOLS, "every_kernel": program}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(real, "EVERY_KERNEL", tmp_path / "none")
    assert "none is missing: python setup.py build_ext --inplace" in check("without")["failures"][0]
    monkeypatch.setattr(real, "EVERY_KERNEL", tmp_path / "every_kernel")
    stage = check("with")
    assert "cuda under memcheck: x, 5 channels, float32: output is off" in stage["failures"]
    assert stage["found"]["cuda"] == {"memcheck errors": None, "racecheck hazards": 2}


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
