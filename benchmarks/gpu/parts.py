"""The parts of a gpu_check. Each works in child processes, within its own time limit, and says what it found.

A part is a function of a ``Run`` that returns a status and fills in ``run.found``: ``summary`` (one line), ``failures``
(one line each) and what else the JSON is to hold. It may raise: gpu_check reports that and goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tools import nvidia_smi, output_of
from .bench_plan import cells
from .child import OUT_OF_TIME, ROOT, Ended, Event, EventReader, Supervised, run_limited, supervise
from .document import Document

OK, FAILED, TIMED_OUT = "ok", "failed", OUT_OF_TIME
NOT_RUN = "not run"

TEST_LIMIT = 60.0  # seconds for one operator test, compilation of its kernels included
EXERCISE_LIMIT = 60.0
CANDIDATE_LIMIT = 45.0  # seconds that one candidate of the benchmark may take for one activity
COMPILE_LIMIT = 120.0  # seconds for the first calls of one backend on one shape
COMPILE_SHARE = 0.3  # of the benchmark's time, at most, for filling the caches of compiled kernels in parallel
SANITIZER_TOOLS = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}
SANITIZER_STATUS = 86


@dataclass
class Run:
    """What a part needs. ``deadline`` is of ``time.monotonic``; ``folder`` is for this part's files."""

    device: str
    backends: list[str]
    precisions: list[str]
    document: Document
    folder: Path
    deadline: float
    small: bool  # the little mode that tests everything on a CPU
    suite: str
    shapes: list[str] | None
    peers: list[str]
    processes: int
    tests: list[str]  # what pytest is given
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def python(self, *arguments: object) -> list[str]:
        return [sys.executable, *map(str, arguments)]

    def stem(self, name: str) -> Path:
        return self.folder / name

    def available(self, backend: str) -> list[str]:
        """Precisions that a backend can run here (all, if the environment part could not tell)."""
        told = self.document.data["backends"]
        return [p for p in self.precisions if not told or told.get(p, {}).get(backend, "missing") == ""]


def environment(run: Run) -> str:
    """GPU, driver, torch, Triton, CUDA, commit, tools, and which backends can run."""
    machine = run.document.data["machine"]
    machine |= describe_machine()
    stem = run.stem("describe")
    ended = run_limited(
        run.python("-m", "benchmarks.gpu.describe", "--device", run.device, "--stem", stem), run.left, _log(stem)
    )
    events = EventReader(stem.with_suffix(".jsonl")).new()
    if not events:
        run.found["failures"] = [ended.reason]
        return TIMED_OUT if ended.status is None else FAILED
    with run.document.lock:
        run.document.data["environment"] = events[0]["environment"]
        run.document.data["backends"] = events[0]["backends"]
        run.document.data["commit"] = run.document.data["commit"] or events[0]["environment"]["commit"]
    can = [
        name
        for name in dict.fromkeys(name for statuses in events[0]["backends"].values() for name in statuses)
        if any(statuses.get(name) == "" for statuses in events[0]["backends"].values())
    ]
    told = events[0]["environment"]
    facts = [told.get("gpu"), f"driver {machine['driver']}" if "driver" in machine else "", f"torch {told['torch']}"]
    facts += [f"CUDA {told['cuda']}" if told.get("cuda") else "", f"triton {told['packages'].get('triton', 'none')}"]
    facts += [f"commit {run.document.data['commit'][:10] or 'unknown'}{' and changes' if told['modified'] else ''}"]
    facts += [f"our backends that can run on {run.device}: {', '.join(can) or 'none'}"]
    run.found["summary"] = ", ".join(fact for fact in facts if fact)
    run.found["backends"] = can
    return OK


def describe_machine() -> dict[str, str]:
    """What the driver and the tools on the path say."""
    fields = {"gpu": "name", "driver": "driver_version", "memory": "memory.total", "max_clock": "clocks.max.sm",
              "power_limit": "power.limit", "temperature": "temperature.gpu", "clock": "clocks.sm"}  # fmt: skip
    facts = dict(zip(fields, nvidia_smi(*fields.values()), strict=False))
    facts = {name: value for name, value in facts.items() if value}
    for tool in ("nvcc", "compute-sanitizer", "ncu"):
        versions = re.findall(r"(?:release|[Vv]ersion) ?([\d.]+)", output_of(tool, "--version"))
        if versions:
            facts[tool] = versions[-1]
    return facts


def build(run: Run) -> str:
    """Load the compiled libraries; build them in the tree where they are missing or don't load here."""
    probe = run.python("-c", "import natten_ext; print(natten_ext.__version__)")
    log = _log(run.stem("build"))
    before = probe
    if run.device == "cuda" and shutil.which("nvcc") is not None and (ROOT / "csrc" / "cuda").is_dir():
        # Importing the package does not load the kernels for GPUs.
        before = run.python("-c", "import sys, natten_ext.backends.cuda as cuda; sys.exit(cuda._not_loaded() or 0)")
    if run_limited(before, min(run.left, 120), log).status == 0:
        run.found["summary"] = "loaded what was built before"
        return OK
    begin = time.monotonic()
    built = run_limited(run.python("setup.py", "build_ext", "--inplace"), run.left, log, _architecture(run))
    run.found["build_seconds"] = round(time.monotonic() - begin, 1)
    run.found["summary"] = f"built in {run.found['build_seconds']:.0f} s"
    loads = run_limited(probe, max(30.0, run.left), log)
    run.found["failures"] = [f"build: {built.reason}"] * bool(built.reason) + [f"load: {loads.reason}"] * bool(
        loads.reason
    )
    return _status_of(built, loads)


def _architecture(run: Run) -> dict[str, str]:
    """Build CUDA kernels for the GPU at hand alone, unless the user says for which."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ or not run.device.startswith("cuda"):
        return {}
    answer = nvidia_smi("compute_cap")
    return {"TORCH_CUDA_ARCH_LIST": answer[0]} if answer else {}


def tests(run: Run) -> str:
    """The operator tests on the device, for every backend, in several processes."""
    shards = max(1, run.processes // max(1, len(run.backends)))
    counts = {name: Counter() for name in run.backends}
    failures: list[str] = []
    slowest: list[tuple[float, str]] = []

    def shard(backend: str, number: int) -> Supervised:
        def on_event(event: Event) -> None:
            with run.document.lock:
                if "collected" in event:
                    counts[backend]["collected"] += event["collected"]
                elif "lost" in event:
                    counts[backend]["lost"] += 1
                    failures.append(f"{event['lost'][0]}: {event['reason']}")
                elif "test" in event:
                    counts[backend][event["outcome"]] += 1
                    slowest.append((event["seconds"], event["test"]))
                    if event["outcome"] == "failed":
                        failures.append(f"{event['test']}: {event['reason']}")
                run.found["backends"] = {name: _with_not_run(count) for name, count in counts.items()}
                run.found["failures"] = failures
                run.found["summary"] = _sum_up(counts)
                run.document.save(now=False)

        stem = run.stem(f"{backend}-{number}")
        environment = {
            "NATTEN_EXT_TEST_BACKENDS": backend,
            "NATTEN_EXT_TEST_DEVICES": run.device,
            "GPU_CHECK_STEM": str(stem),
            "GPU_CHECK_SHARD": f"{number}/{shards}",
        }
        command = run.python(
            "-m", "pytest", *run.tests, "-q", "--tb=short", "--continue-on-collection-errors",
            "-p", "benchmarks.gpu.pytest_plugin", "-p", "no:cacheprovider",
        )  # fmt: skip
        return supervise(command, stem, run.deadline, TEST_LIMIT, on_event, environment)

    outcomes = _in_parallel(shard, [(name, number) for name in run.backends for number in range(shards)])
    run.found["slowest"] = [f"{seconds:.1f} s {test}" for seconds, test in sorted(slowest, reverse=True)[:10]]
    failures += [f"{name}: {reason}" for name, reason in outcomes.items() if reason and reason != OUT_OF_TIME]
    if not any(count["collected"] for count in counts.values()):
        failures.append("no operator test was collected")
    return _status(outcomes.values(), failures)


def _with_not_run(count: Counter[str]) -> dict[str, int]:
    ran = sum(count[name] for name in ("passed", "failed", "skipped", "lost"))
    return {**count, "not_run": max(0, count["collected"] - ran)}


def _sum_up(counts: dict[str, Counter[str]]) -> str:
    return "; ".join(
        f"{name}: {c['passed']} passed, {c['failed'] + c['lost']} failed of {c['collected']}"
        for name, c in counts.items()
    )


def exercises(names: tuple[str, ...], of: tuple[str, ...] | None = None) -> Callable[[Run], str]:
    """A part that runs some of ``benchmarks.gpu.exercises``, in one process per backend; ``of``: these precisions."""

    def part(run: Run) -> str:
        results: list[list[Any]] = []

        def one(backend: str) -> Supervised:
            def on_event(event: Event) -> None:
                with run.document.lock:
                    if "exercise" in event:
                        results.append([*event["exercise"], event["status"], event["reason"]])
                    elif "lost" in event:
                        results.append([*event["lost"], "lost", event["reason"]])
                    _report_exercises(run, results)
                    run.document.save(now=False)

            stem = run.stem(backend)
            deadline = time.monotonic() + run.left / (len(run.backends) - run.backends.index(backend))
            return supervise(_exercise_command(run, backend, names, of, stem), stem, deadline, EXERCISE_LIMIT, on_event)

        outcomes = _in_parallel(one, [(name,) for name in run.backends], 1)
        failures = run.found.setdefault("failures", [])
        failures += [f"{name}: {reason}" for name, reason in outcomes.items() if reason and reason != OUT_OF_TIME]
        return _status(outcomes.values(), failures)

    return part


def _exercise_command(
    run: Run, backend: str, names: Iterable[str], of: tuple[str, ...] | None, stem: Path
) -> list[str]:
    can = run.available(backend)
    chosen = [name for name in can if of is None or name in of] or can
    return run.python(
        "-m", "benchmarks.gpu.exercises", *names, "--backend", backend, "--device", run.device, "--stem", stem,
        *(word for name in chosen for word in ("--precision", name)),
        *(("--shrink", "--repeats", 3) if run.small else ()),
    )  # fmt: skip


def _report_exercises(run: Run, results: list[list[Any]]) -> None:
    bad = [r for r in results if r[4] not in ("ok", "cannot")]
    run.found["results"] = results
    run.found["failures"] = [f"{', '.join(r[:4])}: {r[4]}: {r[5]}" for r in bad]
    cannot = Counter(r[5] for r in results if r[4] == "cannot")
    run.found["summary"] = f"{sum(r[4] == 'ok' for r in results)} ok, {len(bad)} failed" + "".join(
        f", {number} not applicable ({reason})" for reason, number in cannot.items()
    )


def sanitizer(run: Run) -> str:
    """compute-sanitizer's memcheck and racecheck over the exercise ``small``."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or (not run.device.startswith("cuda") and not run.small):
        run.found["reason"] = "compute-sanitizer is not installed" if tool is None else "no CUDA device"
        return NOT_RUN
    failures = run.found.setdefault("failures", [])
    tools = run.found.setdefault("tools", {})
    timed_out = False
    pairs = [(backend, name) for name in SANITIZER_TOOLS for backend in run.backends]
    for number, (backend, name) in enumerate(pairs):
        stem = run.stem(f"{backend}-{name}")
        limit = run.left / (len(pairs) - number)
        command = [
            tool, "--tool", name, "--error-exitcode", str(SANITIZER_STATUS), "--report-api-errors", "no",
            "--target-processes", "application-only",
            *_exercise_command(run, backend, ["small"], ("bfloat16", "float32"), stem),
        ]  # fmt: skip
        # Each tensor an allocation of its own, so that an access beyond it is seen.
        ended = run_limited(command, limit, _log(stem), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        ran = [event for event in EventReader(stem.with_suffix(".jsonl")).new() if "exercise" in event]
        found = [int(number) for number in re.findall(SANITIZER_TOOLS[name], ended.output)]
        result = {"problems": sum(found) if found else None, "exercises": len(ran), "seconds": round(ended.seconds, 1)}
        tools[f"{name}, {backend}"] = result
        wrong = [f"{', '.join(e['exercise'])}: {e['reason']}" for e in ran if e["status"] not in ("ok", "cannot")]
        failures += [f"{name}: {text}" for text in wrong]
        if ended.status is None:
            timed_out = True
            failures += [f"{name}, {backend}: {sum(found)} problems"] * bool(sum(found))
        elif sum(found) or ended.status == SANITIZER_STATUS:
            failures.append(f"{name}, {backend}: {sum(found)} problems; first: {_first_problem(ended.output)}")
        elif ended.status or not found:
            failures.append(f"{name}, {backend}: {ended.reason or 'no summary'}")
        run.found["summary"] = "; ".join(
            f"{key}: {'?' if value['problems'] is None else value['problems']} found in {value['exercises']} exercises"
            for key, value in tools.items()
        )
        run.document.save()
    return FAILED if failures else TIMED_OUT if timed_out else OK


def _first_problem(output: str) -> str:
    lines = [line.lstrip("= ").strip() for line in output.splitlines() if line.startswith("=========")]
    return next((line for line in lines if re.search(r"Invalid|hazard|Error|Race|Uninit", line)), "(see the log)")


def bench(run: Run) -> str:
    """Fill the caches of compiled kernels in parallel, then measure one cell after the other."""
    precisions = [name for name in run.precisions if name != "float64"]
    plan_cells = [c for c in cells(run.suite, precisions) if run.shapes is None or c.shape in run.shapes]
    if run.small or not {"flex", "natten"} & set(run.peers):  # compilers take longer on a CPU than all the rest
        plan_cells = [cell for cell in plan_cells if cell.candidates == "quick"]
    plan = {
        "device": run.device, "suite": run.suite, "backends": run.backends, "peers": run.peers, "memory": not run.small,
        "repeats": 3 if run.small else 25, "budget": 0.02 if run.small else 0.3,
        "rate_samples": 2 if run.small else 12, "cells": [cell.to_dict() for cell in plan_cells],
    }  # fmt: skip
    path = run.folder / "plan.json"
    path.write_text(json.dumps(plan))
    command = run.python("-m", "benchmarks.gpu.bench_worker", "--plan", path)
    failures = run.found.setdefault("failures", [])
    if not run.small:
        _compile_first(run, command)
    data, left, missing = run.document.data, {cell.name for cell in plan_cells}, {}

    def on_event(event: Event) -> None:
        with run.document.lock:
            if "rates" in event:
                data["rates"][event["precision"]] = event["rates"]
            elif "rows" in event:
                plan = event["plan"]
                data["rows"] += [
                    {**row, "precision": plan["precision"], "pass": plan["candidates"]} for row in event["rows"]
                ]
                if event["order"] == "double":
                    left.discard(event["cell"])
            elif "lost" in event:
                cell, candidate, activity = event["lost"]
                failures.append(f"lost {candidate or 'the cell'} on {cell} at {activity}: {event['reason']}")
                if not candidate:
                    missing[cell] = event["reason"]
            data["cells_not_run"] = [cell.name for cell in plan_cells if cell.name in left and cell.name not in missing]
            run.found["summary"] = f"{len(plan_cells) - len(left)} of {len(plan_cells)} cells"
            run.document.save(now=False)

    stem = run.stem("bench")
    ended = supervise([*command, "--stem", str(stem)], stem, run.deadline, CANDIDATE_LIMIT, on_event)
    if ended.reason and ended.reason != OUT_OF_TIME:
        failures.append(ended.reason)
    wrong = [r for r in data["rows"] if r["group"] == "ours" and r["status"] in ("wrong", "cannot", "lost")]
    if wrong:
        run.found["reason"] = f"{len(wrong)} results of ours are wrong or missing"
    return _status([ended.reason], [*failures, *wrong])


def _compile_first(run: Run, command: list[str]) -> None:
    first_calls: dict[str, Any] = {}

    def one(number: int) -> Supervised:
        def on_event(event: Event) -> None:
            if "compiled" in event:
                cell, backend, _ = event["compiled"]
                with run.document.lock:
                    first_calls[f"{cell.removesuffix(', quick')}, {backend}"] = event["seconds"]

        stem = run.stem(f"compile-{number}")
        until = time.monotonic() + COMPILE_SHARE * run.left
        arguments = ["--stem", str(stem), "--compile-only", f"{number}/{run.processes}"]
        return supervise([*command, *arguments], stem, until, COMPILE_LIMIT, on_event)

    outcomes = _in_parallel(one, [(number,) for number in range(run.processes)])
    run.found["first_calls"] = first_calls
    run.found["compile_reasons"] = [reason for reason in outcomes.values() if reason]
    run.document.save()


def _in_parallel(
    function: Callable[..., Supervised], arguments: list[tuple[Any, ...]], workers: int | None = None
) -> dict[str, str]:
    """Reasons by argument, empty where all is well."""
    with ThreadPoolExecutor(max_workers=workers or max(1, len(arguments))) as pool:
        futures = {" ".join(map(str, a)): pool.submit(function, *a) for a in arguments}
        return {name: future.result().reason for name, future in futures.items()}


def _status(reasons: Iterable[str], failures: Iterable[object]) -> str:
    if list(failures):
        return FAILED
    return TIMED_OUT if any(reasons) else OK


def _status_of(*ended: Ended) -> str:
    if all(e.status == 0 for e in ended):
        return OK
    return TIMED_OUT if any(e.status is None for e in ended) else FAILED


def _log(stem: Path) -> Path:
    return stem.with_suffix(".log")


@dataclass(frozen=True)
class Part:
    """``share``: of the time left, beside the later parts'; at least ``floor`` seconds, since others build on it.

    ``least``: seconds below which it is not worth starting.
    """

    name: str
    run: Callable[[Run], str]
    share: float
    least: float
    needs_backend: bool = True
    floor: float = 0.0


PARTS = (
    Part("build", build, 10, 10, needs_backend=False, floor=240),
    Part("environment", environment, 5, 5, needs_backend=False, floor=180),
    Part("tests", tests, 30, 15),
    Part("repeat", exercises(("repeat",)), 7, 10),
    Part("capture", exercises(("small", "compile", "graphs", "streams"), of=("bfloat16",)), 8, 10),
    Part("sanitizer", sanitizer, 12, 15),
    Part("bench", bench, 45, 20),
)
