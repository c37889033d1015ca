"""Everything that needs a GPU, in one command that ends in time.

    python -m benchmarks.gpu_check --out DIR

Stages, in this order (``benchmarks.gpu.stages``):

- ``load``: the compiled libraries load and have code for this GPU; driver, clocks, tools (always done);
- ``contact``: our backends on seven named shapes, every order, against float64, then timed;
- ``counters``: Nsight Compute on the CUDA kernels;
- ``sanitizer``: compute-sanitizer's memcheck and racecheck over every CUDA kernel and odd little shapes in Triton;
- ``tests``: the operator tests on the device;
- ``repeat``: tests that only a GPU can run: repeated runs, CUDA graphs, streams, torch.compile;
- ``peers``: plain PyTorch, SDPA, FlexAttention and NATTEN beside ours, on three shapes.

Each works in processes of its own, with a limit: what fails, hangs or breaks a GPU's context is reported, and the rest
goes on. DIR gets ``gpu_check.json``, ``gpu_check.md`` and ``logs/``; the first two are whole at any time, so a killed
run keeps what it measured. Nothing is fetched from a network. ``--device cpu`` tries it in small, without a GPU.

Exit status: 0; 1 if something is wrong or failed; 2 for arguments that make no sense; 130 if interrupted. What did not
fit in the time is no failure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable

from benchmarks import tables
from benchmarks.figures import figures_block, figures_to_reach
from benchmarks.gpu.processes import OUT_OF_TIME, kill_all
from benchmarks.gpu.stages import STAGES, NotRunError, Run, Stage
from benchmarks.precision import PRECISIONS
from benchmarks.record import Record, output_folder, write_whole
from benchmarks.shapes import SHAPES

NOT_RUN, RUNNING, OK, FAILED = "not run", "running", "ok", "failed"
LEAST = 2.0  # seconds below which no stage is worth starting


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out",
        type=output_folder,
        required=True,
        metavar="DIR",
        help="made if need be; earlier results there are replaced",
    )
    add("--minutes", type=float, default=8.0, help="time for everything (default 8)")
    add("--stages", default=",".join(STAGES), metavar="LIST", help=f"of {','.join(STAGES)} (default: all)")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="CUDA_VISIBLE_DEVICES chooses; cpu: in small")
    help = "of contact and peers (default: bfloat16; float32 with --device cpu)"
    add("--dtype", choices=PRECISIONS, default=None, help=help)
    add("--backend", action="append", metavar="NAME", help="only this backend (repeatable); default: all that can run")
    add("--shape", action="append", choices=SHAPES, metavar="NAME", help="in contact only this shape (repeatable)")
    add("--peers", default="naive,sdpa,flex,natten", metavar="LIST", help="as in attn_bench")
    add("--tests", nargs="+", default=["tests/operators"], metavar="PATH", help="what pytest is given")
    add("--processes", type=int, default=min(12, max(1, (os.cpu_count() or 1) - 2)), help="of pytest")
    add("--commit", default="", help="of this tree, where it is not a git checkout")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    options.out = options.out.resolve()  # the stages' processes run in the repository's root
    options.stages = options.stages.split(",")
    for name in options.stages:
        if name not in STAGES:
            parser.error(f"--stages must be among {', '.join(STAGES)}; got {name!r}")
    if options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    return options


def main(
    arguments: list[str] | None = None, stages: dict[str, tuple[Callable[[Run, Stage], None], float]] = STAGES
) -> int:
    """Run the check; returns the exit status. ``stages`` are given by tests."""
    options = parse(arguments)
    end = time.monotonic() + 60 * options.minutes
    described = {name: str(value) for name, value in vars(options).items() if value is not None}
    entries = {name: {"status": NOT_RUN} for name in stages if name in options.stages or name == "load"}
    record = Record({}, options.dtype)
    record.more |= {"arguments": described, "stages": entries, "finished": False}
    shutil.rmtree(options.out / "logs", ignore_errors=True)

    def save() -> None:
        record.write(options.out / "gpu_check.json")
        write_whole(options.out / "gpu_check.md", page(record))

    run = Run(options, record, options.out / "logs", save, [])
    run.logs.mkdir(parents=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for name, entry in entries.items():
            work, seconds = stages[name]
            _run_stage(name, work, min(seconds, end - time.monotonic()), entry, run)
        record.more["finished"] = True
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 130
    finally:
        kill_all()
        for entry in entries.values():
            if entry["status"] == RUNNING:
                entry |= {"status": FAILED, "reason": "interrupted"}
        save()
        signal.signal(signal.SIGTERM, before)
    print(figures_block(figures_to_reach(record)))
    print(f"\nwritten: {options.out / 'gpu_check.json'}, gpu_check.md, logs/")
    return 1 if any(entry["status"] == FAILED for entry in entries.values()) else 0


def _run_stage(name: str, work: Callable[[Run, Stage], None], seconds: float, entry: dict, run: Run) -> None:
    """Whatever the stage does, this returns."""
    begin = time.monotonic()
    if seconds < LEAST:
        entry["reason"] = OUT_OF_TIME
    elif name != "load" and not run.backends:
        entry["reason"] = f"no backend of ours can run on {run.options.device}"
    else:
        print(f"{name}: up to {seconds:.0f} s", flush=True)
        entry["status"] = RUNNING
        run.save()
        try:
            work(run, Stage(begin + seconds, entry))
            late = entry.get("reason", "").startswith(OUT_OF_TIME)
            entry["status"] = FAILED if entry.get("failures") else OUT_OF_TIME if late else OK
        except NotRunError as error:
            entry |= {"status": NOT_RUN, "reason": str(error)}
        except Exception as error:  # a stage that is broken must not take the others along
            entry |= {"status": FAILED, "reason": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        entry["seconds"] = round(time.monotonic() - begin, 1)
    run.save()
    print(f"{name}: {'; '.join(filter(None, (entry['status'], _what(entry), entry.get('reason'))))}", flush=True)
    for failure in entry.get("failures", [])[:20]:
        print(f"    {failure}", flush=True)


def _what(entry: dict) -> str:
    found = [f"{backend}: {tables.counts_line(counts)}" for backend, counts in entry.get("found", {}).items()]
    return "; ".join([*filter(None, [entry.get("summary")]), *found])


def page(record: Record) -> str:
    """What a reader wants first: what ran, what failed, figures, then times. Every number is from the record."""
    told = record.environment
    names = ("gpu", "driver", "commit", "date", "torch", "cuda", "python", "clock", "max_clock", "power_limit")
    machine = [(name, told[name]) for name in names if told.get(name)]
    machine += [(name, version) for name, version in told.get("packages", {}).items()]
    lines = [
        (name, entry["status"], entry.get("seconds", ""), _what(entry), entry.get("reason", ""))
        for name, entry in record.more["stages"].items()
    ]
    failures = [f"- {n}: {text}" for n, entry in record.more["stages"].items() for text in entry.get("failures", ())]
    sections = {
        "gpu_check": "" if record.more["finished"] else "**This run did not end: below is what it had then.**",
        "Machine": tables.table(("", ""), machine),
        "Stages": tables.table(("stage", "status", "s", "what", "why"), lines),
    }
    if failures:
        sections["What is wrong"] = "\n".join(failures)
    if record.rates:
        sections |= {
            "Figures to reach": tables.figures_table(record),
            f"Operators alone, {record.precision}": tables.operators_table(record),
            "Whole steps, time over ours": tables.steps_table(record),
            "Rates measured in this run": str(record.rates),
        }
    title, *others = (f"# {title}\n\n{text}".strip() for title, text in sections.items())
    return "\n\n#".join([title, *others]) + "\n"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
