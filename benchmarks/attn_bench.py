"""Attention benchmark: ours beside plain PyTorch, SDPA, FlexAttention and NATTEN, in every order of differentiation.

    python -m benchmarks.attn_bench --suite cpu --json out.json --plot out.png

Four steps are timed (``--order``):

- ``forward``: without a graph;
- ``backward``: forward and backward to every input and the table;
- ``double``: a gradient-penalty step: forward, backward with a graph, and the backward of the summed squares of the
  gradients to every input, the table and the incoming gradient;
- ``tangent``: forward mode: the output and its tangent along tangents of every input and the table.

Every result is checked against a float64 reference first; a wrong one is printed as WRONG and not timed. A peer that
can't do a shape or an order says why. Candidates take turns within each round; medians are reported with half the
distance between the quartiles, and with the number of samples: at least three of ours, two of the fastest naive form,
one of any other that takes seconds. What the columns mean is printed with the table; memory is defined in
``benchmarks.memory``, floors in ``benchmarks.floors``, what naive is in ``benchmarks.naive``.

Exit status: 0; 1 if one of our backends was wrong or failed; 2 for arguments that make no sense.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.candidates import PEER_NAMES, Candidate, find_candidates
from benchmarks.environment import describe_environment, limit_memory, load_average
from benchmarks.figures import figures_block, figures_to_reach
from benchmarks.floors import measure_rates
from benchmarks.precision import PRECISIONS, use_precision
from benchmarks.problem import ORDERS
from benchmarks.record import Record, output_file
from benchmarks.report import LEGEND, heading, order_block
from benchmarks.runner import Options, run
from benchmarks.shapes import NAMED
from benchmarks.suites import DEFAULT_DTYPE, SUITES


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="attn_bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=SUITES, default=None, help="default: gpu where there is one, else cpu")
    add("--shape", action="append", metavar="NAME", help="only this shape (repeatable), scaled as in the suite")
    add("--backend", action="append", metavar="NAME", help="only this backend of ours (repeatable); default: all")
    add("--peers", default=",".join(PEER_NAMES), metavar="LIST", help=f"of {','.join(PEER_NAMES)}; or none")
    help = "tf32: float32 on the matrix units; default: bfloat16 in suite gpu, else float32"
    add("--dtype", choices=PRECISIONS, default=None, help=help)
    add("--order", action="append", choices=ORDERS, help="repeatable; default: all")
    add("--device", default=None, help="default: cuda in suite gpu, else cpu")
    add(
        "--threads",
        type=int,
        default=None,
        help="CPU threads; default: at most 2 in suites cpu and general, else torch's",
    )
    add("--repeats", type=int, default=15, help="rounds (default 15); 0: only check")
    add("--budget", type=float, default=1.0, help="seconds of timing per candidate and cell (default 1)")
    add("--alone", action="store_true", help="also time each order's operator alone (in the JSON)")
    add("--no-memory", action="store_true", help="skip the memory measurements")
    add("--json", type=output_file, metavar="FILE", help="write everything there, with the quartiles of each time")
    add("--plot", type=output_file, metavar="FILE", help="draw the ratios and the memory")
    add("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    options.suite = options.suite or ("gpu" if torch.cuda.is_available() else "cpu")
    options.device = options.device or ("cuda" if options.suite == "gpu" else "cpu")
    options.dtype = options.dtype or DEFAULT_DTYPE[options.suite]
    if options.threads is None and options.suite in ("cpu", "general"):
        options.threads = min(2, torch.get_num_threads())
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if options.dtype == "tf32" and not options.device.startswith("cuda"):
        parser.error("--dtype tf32 is a mode of NVIDIA's matrix units; give --device cuda")
    for name, least in (("threads", 1), ("repeats", 0), ("budget", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    scaled = {shape.name: shape for shape in SUITES[options.suite]}
    for name in options.shape or ():
        if name not in NAMED:
            parser.error(f"--shape must be one of {', '.join(NAMED)}; got {name!r}")
    # A named shape that the suite doesn't scale runs as it is.
    options.shapes = [scaled.get(name, NAMED[name]) for name in options.shape or scaled]
    options.peers = () if options.peers == "none" else tuple(options.peers.split(","))
    return options


def main(arguments: list[str] | None = None, extra: tuple[Candidate, ...] = ()) -> int:
    """Run the benchmark; ``extra`` candidates come before the others. Returns the exit status."""
    options = parse(arguments)
    with use_precision(options.dtype) as dtype:
        return _run(options, dtype, extra)


def _run(options: argparse.Namespace, dtype: torch.dtype, extra: tuple[Candidate, ...]) -> int:
    device = torch.device(options.device)
    try:
        candidates = [*extra, *find_candidates(device, dtype, options.backend, options.peers)]
    except ValueError as error:
        print(f"attn_bench: {error}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cpu":
        limit_memory()

    record = Record(describe_environment(device, dtype), options.dtype)
    record.more["arguments"] = {k: str(v) for k, v in vars(options).items() if k != "shapes" and v is not None}
    environment = record.environment
    small = options.suite == "smoke"
    samples = 2 if small or not options.repeats else 12
    rates = measure_rates(device, dtype, samples, small)
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    print(f"suite {options.suite}, {options.dtype}, {where}, torch {environment['torch']}")
    print(f"measured rates: {rates}")
    _warn_if_busy(environment)
    for name, state in environment["backends"].items():
        if state != "available":
            print(f"backend {name}: cannot: {state}")
    print(f"\n{LEGEND}", flush=True)

    settings = Options(
        device, options.dtype, tuple(o for o in ORDERS if o in (options.order or ORDERS)),
        options.repeats, options.budget, not options.no_memory, not options.quiet, alone=options.alone,
    )  # fmt: skip
    printed = None
    for shape, rows in run(options.shapes, candidates, settings, rates):
        record.add(rows, rates)
        tqdm.write(order_block(rows) if shape is printed else f"{heading(shape)}\n{order_block(rows)}", file=sys.stdout)
        printed = shape
        sys.stdout.flush()
        if options.json:
            record.write(options.json)
    record.add([], measure_rates(device, dtype, samples, small))
    print(f"\nrates, best of start and end (for the percentages from here on, and in the JSON): {record.rates}")
    environment["load_average_after"] = load_average()
    if options.json:
        record.write(options.json)
    if options.suite != "smoke":
        print(figures_block(figures_to_reach(record)))
    if options.plot:
        from benchmarks.plot import draw

        draw(record, options.plot)
    failed = [row for row in record.rows if row.failed]
    for row in failed:
        print(f"FAILED: {row.describe()}", file=sys.stderr)
    return 1 if failed else 0


def _warn_if_busy(environment: dict[str, Any]) -> None:
    load, cores = environment["load_average"], os.cpu_count() or 1
    if load > 0.5 * cores:
        print(f"this machine is busy (load average {load:.1f} on {cores} cores): expect wrong times and low rates")


if __name__ == "__main__":
    sys.exit(main())
