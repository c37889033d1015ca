"""The stages of a gpu_check. Each works in processes of its own, until its deadline, and says what it found.

A stage fills in ``Stage.entry``: ``summary`` (one line), ``failures`` (one line each), ``found`` (counts by backend).
It may raise: gpu_check reports that and goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.problem import ORDERS
from benchmarks.record import Record, Row
from benchmarks.shapes import SHAPES
from natten_ext.backends.choice import TAKES

from .processes import OUT_OF_TIME, ROOT, Process, left

CONTACT = ("nat-64", "nat-256", "nat-1024", "church-g5", "cifar-d1", "vitgan-d", "l2-4k")
COUNTED = ("nat-256", "church-g5", "l2-4k")
BESIDE_PEERS = ("nat-64", "church-g5", "vitgan-d")
TEST_LIMIT = 60  # seconds of one test, compilation of its kernels included
TEST_END = 8  # seconds in which pytest-xdist ends, after which it is interrupted
SANITIZER_STATUS = 86
# What the tools print at the end.
SANITIZERS = {
    "memcheck errors": r"ERROR SUMMARY: (\d+) error",
    "racecheck hazards": r"RACECHECK SUMMARY: (\d+) hazard",
}
EVERY_KERNEL = ROOT / "build" / "every_kernel"
"""A program without torch that launches all CUDA kernels, which setup.py links."""
# Two runs of attn_bench in one process: the first checks, the second measures once it is told to go on.
CHECKED = "checked: waiting"
CHECK_THEN_TIME = f"""
import json, sys
from benchmarks.attn_bench import main
check, time = map(json.loads, sys.argv[1:])
main(check)
print({CHECKED!r}, flush=True)
sys.stdin.readline()
sys.exit(main(time))
"""
CHECKING = 0.6  # of contact's time at most: the rest is for timing what is right


class NotRunError(Exception):
    """A stage can't run here; the message is the reason."""


@dataclass
class Run:
    """What the stages share. ``save`` writes everything down; ``backends`` are those that can run."""

    options: argparse.Namespace
    record: Record
    logs: Path
    save: Callable[[], None]
    backends: list[str]

    @property
    def small(self) -> bool:
        """Everything in small, to try it without a GPU."""
        return self.options.device == "cpu"


@dataclass
class Stage:
    """What one stage gets: until when (``time.monotonic``), and where to say what it found."""

    deadline: float
    entry: dict[str, Any]

    def fail(self, what: str, reason: str) -> None:
        """Note a failure; running out of time is none."""
        if reason == OUT_OF_TIME:
            self.entry["reason"] = f"{OUT_OF_TIME}: {what}"
        elif reason:
            self.entry.setdefault("failures", []).append(f"{what}: {reason}")


def load(run: Run, stage: Stage) -> None:
    """Backends that run here, with code for this GPU; driver, clocks and tools."""
    out = run.logs / "load.json"
    command = [sys.executable, "-m", "benchmarks.gpu.load", "--device", run.options.device, "--out", out]
    ended = _start(run, "load", command, {"CUDA_DISABLE_PTX_JIT": "1"}).wait(left(stage.deadline))
    stage.fail("load", ended.reason)
    if not out.exists():
        return
    told = json.loads(out.read_text())
    environment = run.record.environment = told["environment"]
    environment["commit"] = run.options.commit or environment["commit"]
    for name, reason in told["launched"].items():
        stage.fail(name, reason)
    wanted = run.options.backend or list(told["launched"])
    run.backends[:] = [name for name, reason in told["launched"].items() if not reason and name in wanted]
    for name in set(run.options.backend or ()) - set(told["launched"]):
        stage.fail(name, environment["backends"].get(name, "no such backend"))
    stage.entry["backends"] = run.backends
    states = [f"{name}: {environment['backends'].get(name)}" for name in ("cuda", "triton")]
    stage.entry["summary"] = f"can run: {', '.join(run.backends) or 'none'} ({', '.join(states)})"


def contact(run: Run, stage: Stage) -> None:
    """Our backends on the named shapes: all checked side by side, which compiles Triton's kernels; then timed, one
    after the other, in the same processes.

    What takes its process along costs that backend, shape and order: the orders before it get a process of their own.
    """
    shapes = run.options.shape or (("cifar-d2",) if run.small else CONTACT)
    checked_by = stage.deadline - (1 - CHECKING) * left(stage.deadline)
    processes = {
        (shape, backend): _contact(run, backend, shape, ORDERS) for shape in shapes for backend in _timed_on(run, shape)
    }
    for (shape, backend), process in list(processes.items()):
        if not process.wait_for(CHECKED, left(checked_by)):
            ended, rows = process.wait(0), _take(run, f"check-{backend}-{shape}")
            if len(rows) < len(ORDERS):
                stage.fail(f"{backend} on {shape}, {ORDERS[len(rows)]}", ended.reason)
            del processes[shape, backend]
            if rows and ended.status is not None:
                again = processes[shape, backend] = _contact(run, backend, shape, [row.order for row in rows])
                again.wait_for(CHECKED, left(checked_by))
    for (shape, backend), process in processes.items():
        process.release()
        ended, rows = process.wait(left(stage.deadline)), _take(run, f"time-{backend}-{shape}")
        if not rows or ended.status is None or ended.status < 0:
            stage.fail(f"timing {backend} on {shape}", ended.reason)
    _judge(run, stage, shapes)


def _timed_on(run: Run, shape: str) -> list[str]:
    """The backends with kernels, and of float32 ``matmul`` too, which is there for it."""
    library = run.record.precision in ("float32", "tf32") and not run.options.backend and not run.small
    return [*run.backends, *["matmul"] * (library and SHAPES[shape].kind in TAKES["matmul"])]


def _contact(run: Run, backend: str, shape: str, orders: Iterable[str]) -> Process:
    """Checks a backend on a shape, says ``CHECKED`` and waits to be released; then times what was right."""
    name, more = f"{backend}-{shape}", ("--peers", "none", *_words("--order", orders))
    check = _bench(run, f"check-{name}", [backend], shape, (*more, "--repeats", 0))
    time = _bench(run, f"time-{name}", [backend], shape, more)
    return _start(run, name, [sys.executable, "-c", CHECK_THEN_TIME, json.dumps(check), json.dumps(time)])


def peers(run: Run, stage: Stage) -> None:
    """Plain PyTorch, SDPA's kernels, FlexAttention and NATTEN beside ours; a process for each shape."""
    shapes = ("cifar-d2",) if run.small else BESIDE_PEERS
    for shape in shapes:
        name = f"peers-{shape}"
        arguments = _bench(run, name, run.backends, shape, ("--peers", run.options.peers))
        process = _start(run, name, [sys.executable, "-m", "benchmarks.attn_bench", *arguments])
        ended = process.wait(left(stage.deadline))
        if not {row.order for row in _take(run, name)} >= set(ORDERS):
            stage.fail(name, ended.reason)
    _judge(run, stage, shapes)


def _bench(run: Run, name: str, backends: list[str], shape: str, more: tuple[object, ...]) -> list[str]:
    """Arguments of attn_bench, which leaves its record in the logs as NAME.json."""
    small = ("--suite", "smoke", "--repeats", 1, "--budget", 0, "--no-memory", "--threads", 1)
    how = small if run.small else ("--suite", "gpu", "--repeats", 25, "--budget", 0.3)
    arguments = (
        *how, "--device", run.options.device, "--dtype", run.record.precision, "--alone", "--quiet", "--shape", shape,
        *_words("--backend", backends), "--json", run.logs / f"{name}.json", *more,
    )  # fmt: skip
    return list(map(str, arguments))


def _start(run: Run, name: str, command: list[str], environment: dict[str, str] | None = None) -> Process:
    return Process(command, run.logs / f"{name}.log", environment)


def _words(option: str, values: Iterable[object]) -> list[object]:
    return [word for value in values for word in (option, value)]


def _take(run: Run, name: str) -> list[Row]:
    """The rows that a process of attn_bench left behind, which join the others."""
    path = run.logs / f"{name}.json"
    if not path.exists():
        return []
    found = Record.read(path)
    if found.rows:
        run.record.add(found.rows, found.rates)
        run.save()
    return found.rows


def _judge(run: Run, stage: Stage, shapes: Iterable[str]) -> None:
    rows = [row for row in run.record.rows if row.group == "ours" and row.shape.name in shapes]
    for row in rows:
        if row.failed:
            stage.fail(f"{row.candidate} on {row.shape.name}, {row.order}", f"{row.status}: {row.reason}")
    stage.entry["summary"] = f"{sum(row.timing is not None for row in rows)} of {len(rows)} steps of ours timed"


def counters(run: Run, stage: Stage) -> None:
    """Nsight Compute on the CUDA kernels; see ``benchmarks.gpu.counters``."""
    if "cuda" not in run.backends and not run.small:
        raise NotRunError("the backend cuda can't run")
    if shutil.which("ncu") is None:
        raise NotRunError("ncu is not on the path")
    out = run.options.out / "counters.json"
    command = [sys.executable, "-m", "benchmarks.gpu.counters", "--backend", "cuda", "--out", out]
    ended = _start(run, "counters", [*command, *_words("--shape", COUNTED)]).wait(left(stage.deadline))
    stage.fail("ncu", ended.reason)
    if not ended.reason:
        stage.entry["summary"] = ended.output.strip().splitlines()[-1]


def sanitizer(run: Run, stage: Stage) -> None:
    """compute-sanitizer's memcheck and racecheck over odd little problems."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise NotRunError("compute-sanitizer is not on the path")
    found = stage.entry["found"] = {}
    for backend in sorted(run.backends):  # cuda before triton, which is compiled under the sanitizer
        if backend == "cuda" and not EVERY_KERNEL.exists():
            stage.fail(backend, f"{EVERY_KERNEL} is missing: python setup.py build_ext --inplace links it")
            continue
        for name, pattern in SANITIZERS.items():
            which = name.split()[0]
            command = [
                tool, "--tool", which, "--error-exitcode", SANITIZER_STATUS, "--report-api-errors", "no",
                "--target-processes", "application-only", *_sanitized(run, backend, few=which == "racecheck"),
            ]  # fmt: skip
            # Each tensor an allocation of its own, so that an access beyond it is seen.
            process = _start(run, f"{which}-{backend}", command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            ended = process.wait(left(stage.deadline))
            numbers = [int(number) for number in re.findall(pattern, ended.output)]
            found.setdefault(backend, {})[name] = sum(numbers) if numbers else None
            wrong = [line for line in ended.output.splitlines() if re.search(r", \w+\d\d: (?!right)", line)]
            for line in wrong:
                stage.fail(f"{backend} under {which}", line)
            if sum(numbers):
                stage.fail(f"{backend}, {sum(numbers)} {name}", _first_problem(ended.output))
            elif not numbers or (ended.status and not wrong):
                stage.fail(f"{backend}, {name}", ended.reason or "no summary")
            run.save()


def _sanitized(run: Run, backend: str, few: bool) -> list[object]:
    """The command that a sanitizer watches; ``few``: racecheck takes minutes for everything."""
    if backend == "cuda":
        return [EVERY_KERNEL, *["bfloat16"] * few]
    command = [sys.executable, "-m", "benchmarks.gpu.odd_shapes", "--backend", backend, "--device", run.options.device]
    return [*command, *["--smallest"] * few]


def _first_problem(output: str) -> str:
    lines = [line.lstrip("= ").strip() for line in output.splitlines() if line.startswith("=========")]
    return next((line for line in lines if re.search(r"Invalid|hazard|Error|Race|Uninit", line)), "(see the log)")


def tests(run: Run, stage: Stage) -> None:
    """The operator tests on the device; cuda before triton, whose kernels take long to compile."""
    _pytest(run, stage, "tests", "not gpu", run.options.processes)


def repeat(run: Run, stage: Stage) -> None:
    """Tests that only a GPU can run: repeatability of large problems, CUDA graphs, streams, devices, torch.compile."""
    _pytest(run, stage, "repeat", "gpu", min(4, run.options.processes))  # more would wait for the device


def _pytest(run: Run, stage: Stage, name: str, marker: str, processes: int) -> None:
    found = stage.entry["found"] = {}
    slowest: list[tuple[float, str]] = []
    for backend in sorted(run.backends):
        xml = run.logs / f"{name}-{backend}.xml"
        target = f"{backend}-on-{run.options.device}"
        command = [
            sys.executable, "-m", "pytest", *run.options.tests, "-m", marker, "-k", target, "-v", "--tb=short",
            "-p", "no:cacheprovider", "-n", processes, "--dist", "worksteal", "--timeout", TEST_LIMIT,
            "--timeout-method", "thread", "--session-timeout", max(1, left(stage.deadline) - TEST_END),
            "--continue-on-collection-errors", f"--junitxml={xml}",
        ]  # fmt: skip
        environment = {"NATTEN_EXT_TEST_BACKENDS": backend, "NATTEN_EXT_TEST_DEVICES": run.options.device}
        ended = _start(run, f"{name}-{backend}", command, environment).wait(left(stage.deadline))
        outcomes = read_junit(xml) if xml.exists() else {}
        counts = found[backend] = Counter(outcome for outcome, _, _ in outcomes.values())
        collected = re.search(r"workers? \[(\d+) items?\]", ended.output)
        if collected and (missing := int(collected[1]) - sum(counts.values())) > 0:
            counts["not run"] = missing
        for test, (outcome, reason, seconds) in outcomes.items():
            slowest.append((seconds, test))
            if outcome == "failed":
                stage.fail(test, reason)
        if "session-timeout" in ended.output:
            stage.fail(backend, OUT_OF_TIME)
        elif ended.status not in (0, 1) or not outcomes:
            stage.fail(backend, ended.reason or "no test ran")
        run.save()
    stage.entry["slowest"] = [f"{seconds:.1f} s {test}" for seconds, test in sorted(slowest, reverse=True)[:5]]


def read_junit(path: Path) -> dict[str, tuple[str, str, float]]:
    """Outcome ("passed", "failed" or "skipped"), reason and seconds of each test.

    A worker that ends behind a failed test makes xdist report that test once more; what was said first stays.
    """
    found: dict[str, tuple[str, str, float]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}".lstrip(":")
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
        reason = "" if problem is None else (problem.get("message") or problem.text or "").strip().split("\n")[0][:300]
        if found.get(name, ("passed",))[0] != "failed":
            found[name] = outcome, reason, float(case.get("time") or 0)
    return found


STAGES: dict[str, tuple[Callable[[Run, Stage], None], float]] = {
    "load": (load, 30),
    "contact": (contact, 90),
    "counters": (counters, 120),
    "sanitizer": (sanitizer, 60),
    "tests": (tests, 150),
    "repeat": (repeat, 60),
    "peers": (peers, 600),
}
"""In this order; seconds that each may take. What one does not use goes to the later ones."""
