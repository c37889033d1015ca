"""Random problems of all kinds: is ours faster than plain PyTorch, and than SDPA, on shapes that no suite names?

    python -m benchmarks.sweep --threads 2 --minutes 8 --json out.json

For each problem (``benchmarks.random_shapes``) and order the candidates take turns; figures are ratios of medians:
plain PyTorch's time (its fastest form's) over ours, and SDPA's over ours where its fused kernel can do the order. A
cell below ``--again`` is measured once more at the end, with three times the samples, and the second figure counts:
of many noisy figures, the least would be mostly noise. The ten worst are printed with the command that reruns each.
Results are not checked unless ``--check`` asks for it.

Exit status: 0; 1 if ours failed or was wrong; 2 for arguments that make no sense.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

import natten_ext
from benchmarks.candidates import find_candidates
from benchmarks.environment import describe_environment, limit_memory, load_average
from benchmarks.floors import measure_rates
from benchmarks.precision import PRECISIONS, use_precision
from benchmarks.problem import ORDERS
from benchmarks.random_shapes import KINDS, kind_of, random_shape
from benchmarks.record import Record, Row, output_file
from benchmarks.report import describe_features
from benchmarks.runner import Options, run
from benchmarks.shapes import Shape

CANDIDATES = ("cpu", "naive", "naive-mask", "naive-loop", "sdpa")
DEFAULT_ORDERS = ("forward", "backward", "double")
WORST = 10


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--count", type=int, default=240, help="how many problems (default 240), a quarter of each kind")
    add("--problem", type=int, action="append", metavar="NUMBER", help="only this one of the seed (repeatable)")
    add("--kind", action="append", choices=KINDS, help="only this kind (repeatable)")
    add("--order", action="append", choices=ORDERS, help=f"repeatable; default: {', '.join(DEFAULT_ORDERS)}")
    add("--minutes", type=float, default=None, help="begin no further problem after so long")
    add("--threads", type=int, default=2)
    add("--dtype", choices=[name for name in PRECISIONS if name != "tf32"], default="float32")
    add("--repeats", type=int, default=15, help="samples of a cell at most (default 15)")
    add("--budget", type=float, default=0.3, help="seconds of timing of ours per cell (default 0.3)")
    add("--again", type=float, default=1.15, metavar="RATIO", help="measure cells below it once more (default 1.15)")
    add("--check", action="store_true", help="check every result against float64 first")
    add("--json", type=output_file, metavar="FILE", help="write all rows there")
    add("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    for name, least in (("count", 1), ("threads", 1), ("repeats", 1), ("budget", 0), ("minutes", 0), ("again", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    numbers = options.problem or range(options.count)
    if min(numbers) < 0:
        parser.error(f"--problem must be at least 0, got {min(numbers)}")
    shapes = (random_shape(options.seed, number) for number in numbers)
    options.shapes = [shape for shape in shapes if kind_of(shape) in (options.kind or KINDS)]
    options.orders = tuple(order for order in ORDERS if order in (options.order or DEFAULT_ORDERS))
    if not options.shapes:
        parser.error(f"--kind {', '.join(options.kind)}: none among the problems asked for")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep. Returns the exit status."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    limit_memory()
    with use_precision(options.dtype) as dtype:
        record = measure(options, dtype)
    print("\n".join(summary(record, options)))
    if options.json:
        record.write(options.json)
    failed = [row for row in record.rows if row.failed]
    for row in failed:
        print(f"FAILED: {row.describe()}", file=sys.stderr)
    return int(bool(failed))


def measure(options: argparse.Namespace, dtype: torch.dtype) -> Record:
    """All problems and orders, and once more those cells in which ours came out slow."""
    device = torch.device("cpu")
    record = Record(describe_environment(device, dtype), options.dtype)
    record.environment["instruction_set"] = natten_ext.backends.cpu.instruction_set()
    record.more["arguments"] = {k: str(v) for k, v in vars(options).items() if k != "shapes" and v is not None}
    candidates = [c for c in find_candidates(device, dtype, ["cpu"], ("naive", "sdpa")) if c.name in CANDIDATES]
    rates = measure_rates(device, dtype, samples=4)

    def rows_of(shapes: list[Shape], orders: tuple[str, ...], budget: float, repeats: int, until: float) -> list[Row]:
        settings = Options(
            device, options.dtype, orders, repeats, budget, memory=False, progress=not options.quiet,
            check=options.check,
        )  # fmt: skip
        found: list[Row] = []
        for shape, rows in run(shapes, candidates, settings, rates):
            if time.monotonic() > until and found and found[-1].shape is not shape:
                break
            found += rows
        return found

    until = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
    record.add(rows_of(options.shapes, options.orders, options.budget, options.repeats, until), rates)
    again = [row for row in record.rows if row.group == "ours" and row.ratio and row.ratio < options.again]
    second = [rows_of([r.shape], (r.order,), 3 * options.budget, 3 * options.repeats, float("inf")) for r in again]
    record.add([row for rows in second for row in rows], measure_rates(device, dtype, samples=4))
    record.environment["load_average_after"] = load_average()
    return record


def ratios(record: Record, other: str) -> dict[tuple[str, str], float]:
    """By cell, the time of ``other`` ("naive": its fastest form; or a candidate's name) over ours."""
    found = {}
    for cell, rows in record.cells.items():
        mine = next((row for row in rows.values() if row.group == "ours"), None)
        if mine is None or mine.timing is None:
            continue
        if other == "naive" and mine.ratio:
            found[cell] = mine.ratio
        elif other in rows and rows[other].timing:
            found[cell] = rows[other].timing.median / mine.timing.median
    return found


def summary(record: Record, options: argparse.Namespace) -> list[str]:
    """The lines that the command prints."""
    facts = record.environment
    lines = [
        f"backend cpu ({facts['instruction_set']}), {record.precision}, {facts['cpu']}, {facts['threads']} threads,"
        f" torch {facts['torch']}, commit {facts['commit'][:7]}{' modified' * facts['modified']}",
        f"{len(record.shapes)} problems of seed {options.seed}; rates: {record.rates};"
        f" load average {facts['load_average']:.1f}, after {facts['load_average_after']:.1f}",
        "",
        f"{'kind':<14}{'order':<10}{'naive / ours: mean':>18}{'least':>7}{'below 1':>9}"
        f"{'SDPA / ours: mean':>20}{'least':>7}{'below 1':>9}{'peak':>7}",
    ]
    against = {other: ratios(record, other) for other in ("naive", "sdpa")}
    for kind in (*KINDS, "all"):
        for order in record.orders:
            cells = [
                (shape.name, order) for shape in record.shapes.values() if kind in (kind_of(shape), "all")
            ]  # fmt: skip
            if not any(cell in against["naive"] for cell in cells):
                continue
            lines.append(
                f"{kind:<14}{order:<10}{_three([against['naive'][c] for c in cells if c in against['naive']], 18)}"
                f"{_three([against['sdpa'][c] for c in cells if c in against['sdpa']], 20)}"
                f"{_peak(record, cells):>6.0f}%"
            )
    lines.append("peak: useful multiply-adds, percent of the rate of a matrix product (median)")
    for other, label in (("naive", "naive"), ("sdpa", "SDPA")):
        worst = sorted(against[other].items(), key=lambda item: item[1])[:WORST]
        if worst:
            lines += ["", f"worst of {label} / ours, of {len(against[other])}:"]
        for (name, order), ratio in worst:
            rows = record.cells[name, order]
            mine = next(row for row in rows.values() if row.group == "ours")
            lines += [
                f"{ratio:6.2f}  {1e3 * mine.timing.median:9.3f} ms  {order:<9}{mine.shape.describe():<20}"
                f" {describe_features(mine.shape)}",
                f"        {command(mine, options)}",
            ]
    return lines


def _three(values: list[float], width: int) -> str:
    """Geometric mean, least, and the share below 1."""
    if not values:
        return f"{'-':>{width}}{'-':>7}{'-':>9}"
    below = sum(value < 1 for value in values) / len(values)
    return f"{statistics.geometric_mean(values):>{width}.2f}{min(values):>7.2f}{below:>9.1%}"


def _peak(record: Record, cells: list[tuple[str, str]]) -> float:
    rows = (row for cell in cells for row in record.cells.get(cell, {}).values())
    return statistics.median(row.fma_percent for row in rows if row.group == "ours" and row.timing)


def command(row: Row, options: argparse.Namespace) -> str:
    """What reruns one cell."""
    dtype = f" --dtype {options.dtype}" if options.dtype != "float32" else ""
    number = row.shape.name.rpartition("-")[2]
    return (
        f"python -m benchmarks.sweep --seed {options.seed} --problem {number} --order {row.order}"
        f" --threads {options.threads}{dtype}"
    )


if __name__ == "__main__":
    sys.exit(main())
