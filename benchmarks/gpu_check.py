"""Everything that needs a GPU, in one command that ends in time: build, tests, sanitizers, benchmark.

    python -m benchmarks.gpu_check --out results/

Parts, in this order:

- ``build``: load the compiled libraries, or build them in the tree;
- ``environment``: GPU, driver, torch, Triton, CUDA, commit, and which of our backends can run (always done);
- ``tests``: the operator tests on the device, for every GPU backend that is present;
- ``repeat``: 100 runs of each problem, bitwise the same;
- ``capture``: torch.compile, CUDA graphs, streams and devices;
- ``sanitizer``: compute-sanitizer's memcheck and racecheck on a small set, where it is installed;
- ``bench``: suite ``gpu`` with peers, in every precision and order, most wanted first; then the figures to reach.

A part works in processes of its own: what fails, hangs or breaks the GPU's context is reported, and the rest goes on.
The time (``--minutes``) is shared out; what does not fit is listed as not run. DIR gets ``gpu_check.json``,
``gpu_check.md`` and ``gpu_check.log``; the first two are whole at any time, so a killed run keeps what it measured.
Nothing is fetched from a network. ``--device cpu`` tries all of this in small on a machine without a GPU.

Exit status: 0; 1 if something is wrong or failed; 2 for arguments that make no sense; 130 if interrupted. What did not
fit in the time is no failure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks.gpu.child import ROOT, stop
from benchmarks.gpu.document import JSON_NAME, LOG_NAME, PAGE_NAME, Document
from benchmarks.gpu.parts import FAILED, NOT_RUN, OUT_OF_TIME, PARTS, Part, Run
from benchmarks.shapes import SHAPES
from benchmarks.suites import PEER_NAMES

PRECISIONS = ("bfloat16", "float16", "float32", "tf32")
RESERVE = 4.0  # seconds for the last words
LOG_SIZE = 200_000  # bytes of each child's log that are kept


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [part.name for part in PARTS]
    add("--out", type=Path, required=True, metavar="DIR", help="made if need be; earlier results there are replaced")
    add("--minutes", type=float, default=8.0, help="time for everything (default 8)")
    add("--parts", default=",".join(names), metavar="LIST", help=f"of {','.join(names)} (default: all)")
    add("--device", default="cuda", help="cuda (default; CUDA_VISIBLE_DEVICES chooses), or cpu: everything in small")
    add("--backend", action="append", metavar="NAME", help="only this backend (repeatable); default: all that can run")
    add("--precision", action="append", choices=PRECISIONS, help="repeatable; default: all that the device has")
    add("--shape", action="append", choices=SHAPES, metavar="NAME", help="benchmark only this shape (repeatable)")
    add("--peers", default=",".join(PEER_NAMES), metavar="LIST", help=f"of {','.join(PEER_NAMES)} (default: all)")
    add("--tests", nargs="+", default=["tests/natten_ext"], metavar="PATH", help="what pytest is given")
    add("--processes", type=int, default=None, help="for tests and compilation (default: cores less 2, at most 12)")
    add("--commit", default="", help="of this tree, where it is not a git checkout")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    for name in options.parts:
        if name not in names:
            parser.error(f"--parts must be among {', '.join(names)}; got {name!r}")
    options.peers = [name for name in options.peers.split(",") if name]
    for name in options.peers:
        if name not in PEER_NAMES:
            parser.error(f"--peers must be among {', '.join(PEER_NAMES)}; got {name!r}")
    if options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    if options.device not in ("cuda", "cpu"):
        parser.error(f"--device must be cuda or cpu, got {options.device!r} (CUDA_VISIBLE_DEVICES chooses among GPUs)")
    options.small = options.device == "cpu"
    if options.processes is None:
        options.processes = min(12, max(1, (os.cpu_count() or 1) - 2))
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    if options.precision is None:
        options.precision = ["float32", "bfloat16"] if options.small else list(PRECISIONS)
    return options


def main(arguments: list[str] | None = None, parts: tuple[Part, ...] = PARTS) -> int:
    """Run the check; returns the exit status. ``parts`` are given by tests."""
    options = parse(arguments)
    end = time.monotonic() + 60 * options.minutes - RESERVE
    described = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    document = Document(options.out, arguments=described, commit=options.commit or _commit())
    folder = Path(tempfile.mkdtemp(prefix="gpu_check-"))
    before = signal.signal(signal.SIGTERM, _interrupt)
    chosen = [part for part in parts if part.name in options.parts or part.name == "environment"]
    for part in chosen:
        document.data["parts"][part.name] = {"status": NOT_RUN, "reason": "the run did not get there"}
    document.save()
    try:
        for number, part in enumerate(chosen):
            _run_part(part, chosen[number:], options, document, folder, end)
        document.data["finished"] = True
    except KeyboardInterrupt:
        stop()
        print("interrupted", flush=True)
        return 130
    finally:
        for entry in document.data["parts"].values():
            if entry["status"] == "running":
                entry["status"], entry["reason"] = FAILED, "interrupted"
        document.save()
        _keep_logs(folder, options.out / LOG_NAME)
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)
    print(_last_words(document))
    print(f"\nwritten: {options.out / JSON_NAME}, {PAGE_NAME}, {LOG_NAME}")
    return 1 if any(part["status"] == FAILED for part in document.data["parts"].values()) else 0


def _run_part(
    part: Part, rest: list[Part], options: argparse.Namespace, document: Document, folder: Path, end: float
) -> None:
    """Give a part its share of the time that is left; whatever it does, this returns."""
    left = end - time.monotonic()
    limit = min(left, max(part.floor, part.least, left * part.share / sum(p.share for p in rest)))
    entry = document.data["parts"][part.name]
    backends = options.backend or document.data["parts"].get("environment", {}).get("backends", [])
    if part.needs_backend and not backends:
        entry["reason"] = f"no backend of ours can run on {options.device} (see the part environment)"
    elif left < part.least:
        entry["reason"] = OUT_OF_TIME
    else:
        entry |= {"status": "running", "reason": "", "limit": round(limit, 1)}
        print(f"{part.name}: up to {entry['limit']:.0f} s of the {left:.0f} s that are left", flush=True)
        begin = time.monotonic()
        (folder / part.name).mkdir()
        run = Run(
            options.device, list(backends), options.precision, document, folder / part.name, begin + entry["limit"],
            options.small, "smoke" if options.small else "gpu", options.shape, options.peers, options.processes,
            options.tests, entry,
        )  # fmt: skip
        try:
            entry["status"] = part.run(run)
        except Exception as error:  # a part that is broken must not take the others along
            entry["status"], entry["reason"] = FAILED, f"{type(error).__name__}: {error}"
            (folder / part.name / "part.log").write_text(traceback.format_exc())
        entry["seconds"] = round(time.monotonic() - begin, 1)
        if entry["status"] == OUT_OF_TIME and not entry["reason"]:
            entry["reason"] = f"its {entry['limit']:.0f} s were over before all was done"
    document.save()
    print(f"{part.name}: {_outcome(entry)}", flush=True)
    for failure in entry.get("failures", [])[:20]:
        print(f"    {failure}", flush=True)


def _outcome(entry: dict) -> str:
    words = [entry["status"], entry.get("summary", ""), entry.get("reason", "")]
    return "; ".join(word for word in words if word)


def _last_words(document: Document) -> str:
    lines = ["", "Parts"]
    lines += [f"  {name:<12} {_outcome(entry)}" for name, entry in document.data["parts"].items()]
    verdicts = {True: "met", False: "MISSED", None: "-"}
    figures = [f for f in document.data["figures"] if f["value"] is not None]
    lines += ["", "Figures to reach" if figures else "No figure to reach was measured."]
    lines += [f"  {verdicts[f['met']]:<7}{f['backend']:<7}{f['name']}, {f['target']}: {f['text']}" for f in figures]
    return "\n".join(lines)


def _keep_logs(folder: Path, target: Path) -> None:
    """All children's logs in one file, each cut to its end."""
    with open(target, "wb") as output:
        for log in sorted(folder.glob("*/*.log"), key=lambda path: path.stat().st_mtime):
            output.write(f"\n===== {log.relative_to(folder)}\n".encode())
            with open(log, "rb") as source:
                source.seek(max(0, log.stat().st_size - LOG_SIZE))
                shutil.copyfileobj(source, output)


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
