"""Tables of the docs, made from result files, so that no figure is typed by hand.

    python -m benchmarks.tables              # rewrites README.md and docs/*.md
    python -m benchmarks.tables --check      # exit status 1, and the names, where one is out of date
    python -m benchmarks.tables PAGE.md ...  # these pages alone

A page says where a table stands and what it is made from, in two comments that begin their lines; what is between
them is replaced:

    <!-- table: KIND FILE -->
    <!-- end of table -->

FILE is a path or a pattern relative to the repository. Kinds:

- ``speed``: ours over the fastest naive form and memory, by shape;
- ``operators``: ours, each operator alone, with percent of the floor;
- ``steps``: whole steps, the time of naive and of other libraries over that of our fastest backend;
- ``figures``: the figures to reach;
- ``orders``: which library gives which derivatives of which shape, and why not the others;
- ``penalty-accuracy``, ``penalty-cost``, ``penalty-curves``: parts of ``benchmarks.penalty_study``;
- ``ran``: for each GPU backend, where it last ran and what passed (of all gpu_check results of a pattern).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .figures import OPERATORS, figures_to_reach
from .record import Record, Row
from .shapes import NAMED, Shape
from .suites import how_scaled

ROOT = Path(__file__).resolve().parent.parent
# At the start of a line: an indented example is none.
MARKED = re.compile(r"^(<!-- table: ([^\n]*?) -->\n)(.*?)^(<!-- end of table -->)", re.DOTALL | re.MULTILINE)
OPENING = re.compile(r"^<!-- table: ", re.MULTILINE)

GPU_BACKENDS = ("triton", "cuda")
# Stages of gpu_check that count something by backend.
FOUND = {
    "tests": "operator tests",
    "repeat": "graphs, streams, compile, repeats",
    "sanitizer": "found by sanitizer",
}


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A markdown table."""
    header = list(header)
    cells = [[str(value).replace("|", "\\|").replace("\n", " ") for value in line] for line in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells))


def speed_table(record: Record) -> str:
    """One line for each shape and backend; the memory of naive is that of the reference backend, if it was measured."""
    lines = []
    columns = 4 if any(row.memory for row in record.rows) else 2
    for name, shape in record.shapes.items():
        for backend in record.ours:
            mine, naive = ([record.cells.get((name, o), {}).get(c) for o in record.orders] for c in (backend, "naive"))
            lines.append((
                _label(shape) if len(record.ours) == 1 else f"{_label(shape)}, {backend}",
                " / ".join(_number(row and row.ratio) for row in mine),
                " / ".join(_memory(row, ".2f") for row in mine),
                " / ".join(_memory(row, ".0f") for row in naive),
            ))  # fmt: skip
    header = ("shape", f"times the speed of naive: {' / '.join(record.orders)}", "memory beyond results: ours", "naive")
    return table(header[:columns], [line[:columns] for line in lines])


def operators_table(record: Record) -> str:
    """Our backends: microseconds of each operator alone and percent of its floor."""

    def alone(row: Row | None) -> str:
        return f"{1e6 * row.alone.median:.0f} ({row.alone_percent:.0f}%)" if row and row.alone else "-"

    lines = []
    for name in _in_order(record):
        shape = record.shapes[name]
        scaled = how_scaled(shape)
        cells = [record.cells.get((name, order), {}) for order in record.orders]
        times = [" / ".join(alone(cell.get(backend)) for cell in cells) for backend in record.ours]
        lines.append((name, shape.describe() + (f" ({scaled})" if scaled != "as it is" else ""), *times))
    alone_orders = " / ".join(OPERATORS[order].removesuffix(" alone") for order in record.orders)
    header = [f"{name}: {alone_orders}, us (percent of the floor)" for name in record.ours]
    return table(("shape", "problem", *header), lines)


def steps_table(record: Record) -> str:
    """Whole steps: the time of every other candidate over that of our fastest backend."""
    peers = [name for name in record.candidates if name not in record.ours and not name.startswith("naive")]
    lines = []
    for name, order in ((name, order) for name in _in_order(record) for order in record.orders):
        cell = record.cells.get((name, order), {})
        mine = [cell[backend] for backend in record.ours if backend in cell and cell[backend].timing]
        best = min(mine, key=lambda row: row.timing.median, default=None)
        if best is None:
            lines.append((name, order, *["-"] * (3 + len(peers))))
            continue
        median = best.timing.median
        ratios = [row.timing.median / median if (row := cell.get(p)) and row.timing else None for p in peers]
        time = f"{best.candidate} {1e6 * median:.0f}"
        lines.append((name, order, time, _memory(best, ".2f"), _number(best.ratio), *map(_number, ratios)))
    return table(("shape", "step", "ours, us", "memory beyond / returned", "fastest naive", *peers), lines)


def figures_table(record: Record) -> str:
    """Met or missed, for every figure."""
    verdict = {True: "met", False: "**missed**", None: "not measured"}
    rows = [(verdict[f.met], f.backend, f.name, f.target, f.text) for f in figures_to_reach(record)]
    return table(("", "backend", "figure", "goal", "measured"), rows)


def orders_table(record: Record) -> str:
    """The orders in which each library gave the right result, by shape; then the reasons of those that did not."""
    candidates = [name for name in record.candidates if not name.startswith("naive")]
    reasons: dict[str, dict[str, None]] = {}  # the orders that each stands for
    lines = []
    for name, shape in record.shapes.items():
        cells = []
        for candidate in candidates:
            rows = [record.cells[name, order][candidate] for order in record.orders]
            right = [row.order for row in rows if row.status == "ok"]
            cells.append("all" if len(right) == len(record.orders) else ", ".join(right) or "no")
            for row in rows:
                if row.status != "ok":
                    reasons.setdefault(f"{candidate}: {row.reason}", {})[row.order] = None
        lines.append((_label(shape), *cells))
    why = "\n".join(f"- {reason.rstrip('.')} ({', '.join(orders)})" for reason, orders in reasons.items())
    return f"{table(('shape', *candidates), lines)}\n\n{why}\n"


def ran_table(records: list[Record]) -> str:
    """The newest commit of each backend on each GPU, from all runs at that commit; "not yet" where there is none."""
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: record.environment["date"]):
        told, stages = record.environment, record.more["stages"]
        run = runs.pop((told["gpu"], told["commit"]), {"backends": [], "found": {}})  # popped: the newest stands last
        found = {n: {**run["found"].get(n, {}), **stages.get(n, {}).get("found", {})} for n in FOUND}
        backends = [*run["backends"], *stages["load"].get("backends", [])]
        runs[told["gpu"], told["commit"]] = {"told": told, "backends": backends, "found": found}
    lines = []
    for backend in GPU_BACKENDS:
        newest = {gpu: run for (gpu, _), run in runs.items() if backend in run["backends"]}
        for gpu, run in newest.items():
            told = run["told"]
            versions = f"{told['torch']}, {told['packages'].get('triton', 'none')}"
            cells = [counts_line(run["found"][name].get(backend, {})) for name in FOUND]
            lines.append((f"`{backend}`", told["commit"][:10], gpu, told["date"][:10], versions, *cells))
        if not newest:
            lines.append((f"`{backend}`", "", "not yet run on a GPU", *[""] * 5))
    return table(("backend", "commit", "GPU", "date", "torch, triton", *FOUND.values()), lines)


def counts_line(counts: dict[str, Any]) -> str:
    """For example "2279 passed, 40 failed"; a question mark for what did not end."""
    return ", ".join(f"{'?' if count is None else count} {name}" for name, count in counts.items()) or "not run"


def _in_order(record: Record) -> list[str]:
    """The shapes of a record as ``benchmarks/shapes.py`` lists them, whatever was measured first."""
    return [name for name in NAMED if name in record.shapes]


def _label(shape: Shape) -> str:
    return f"{shape.name} ({shape.describe().replace(',', ', ')})"


def _memory(row: Row | None, form: str) -> str:
    return format(row.memory.ratio, form) if row and row.memory else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


ONE_FILE: dict[str, Callable[[Record], str]] = {
    "speed": speed_table,
    "operators": operators_table,
    "steps": steps_table,
    "figures": figures_table,
    "orders": orders_table,
}
PENALTIES = ("penalty-accuracy", "penalty-cost", "penalty-curves")


def make(description: str, root: Path = ROOT) -> str:
    """The table that a comment describes. Raises ValueError for an unknown kind, or where there is no such file."""
    kind, _, pattern = description.partition(" ")
    if not pattern or Path(pattern).is_absolute():
        raise ValueError(f"table {kind}: the file must be a path relative to the repository, got {pattern!r}")
    paths = sorted(root.glob(pattern))
    if kind == "ran":
        return ran_table([record for path in paths if "gpu" in (record := Record.read(path)).environment])
    if kind not in (*ONE_FILE, *PENALTIES):
        known = ", ".join((*ONE_FILE, *PENALTIES, "ran"))
        raise ValueError(f"the kind of a table must be one of {known}, got {kind!r}")
    if len(paths) != 1:
        raise ValueError(f"table {kind}: {pattern!r} must be one file, it is {len(paths)}")
    if kind in PENALTIES:
        from .penalties.page import TABLES  # which makes its tables with `table`

        part = kind.removeprefix("penalty-")
        study = json.loads(paths[0].read_text())
        if part not in study:
            raise ValueError(f"table {kind}: {pattern} is no result of benchmarks.penalty_study")
        return TABLES[part](study[part]["rows"])
    return ONE_FILE[kind](Record.read(paths[0]))


def rewrite(text: str, root: Path = ROOT) -> str:
    """A page with every table made anew. Raises ValueError for a comment that is never closed."""
    if len(OPENING.findall(text)) != len(MARKED.findall(text)):
        raise ValueError("a table has no '<!-- end of table -->', or stands inside another")
    return MARKED.sub(lambda match: f"{match[1]}{make(match[2], root)}\n{match[4]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE.md")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    stale = []
    for page in options.pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        try:
            text = page.read_text()
            made = rewrite(text)
            if made != text:
                stale.append(page)
                if not options.check:
                    page.write_text(made)
        except (OSError, ValueError) as error:
            print(f"tables: {page}: {error}", file=sys.stderr)
            return 2
    for page in stale:
        print(f"{'out of date' if options.check else 'rewritten'}: {page}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
