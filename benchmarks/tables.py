"""Tables of the docs, made from result files, so that no figure is typed by hand.

    python -m benchmarks.tables              # rewrites README.md and docs/*.md
    python -m benchmarks.tables --check      # exit status 1, and the names, where one is out of date
    python -m benchmarks.tables PAGE.md ...  # these pages alone

A page says where a table stands and what it is made from, in two comments that begin their lines; what is between
them is replaced:

    <!-- table: KIND FILE [ARGUMENT ...] -->
    <!-- end of table -->

FILE is a path or a pattern relative to the repository. Kinds:

- ``cpu-speed``: ours over the fastest naive form and memory, by shape (of an attn_bench result);
- ``cpu-figures``: the figures to reach of an attn_bench result;
- ``cpu-peers``: which library gives which derivatives of which shape, and why not the others (of an attn_bench result);
- ``gpu-ran``: for each GPU backend, where it last ran and what passed (of all gpu_check results of a pattern);
- ``gpu-figures``: the figures to reach of a gpu_check result;
- ``gpu-speed``: operators alone, with percent of the floor; ARGUMENT: a precision;
- ``gpu-peers``: whole steps beside other libraries; ARGUMENT: a precision.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.markdown import figures_table, peers_table, speed_table, table, tests_line
from benchmarks.shapes import Shape

ROOT = Path(__file__).resolve().parent.parent
# At the start of a line: an indented example is none.
MARKED = re.compile(r"^(<!-- table: ([^\n]*?) -->\n)(.*?)^(<!-- end of table -->)", re.DOTALL | re.MULTILINE)
OPENING = re.compile(r"^<!-- table: ", re.MULTILINE)

ORDERS = ("forward", "backward", "double")
GPU_BACKENDS = ("triton", "cuda")
RAN_HEADER = (
    "backend", "commit", "GPU", "date", "torch, triton", "operator tests", "repeated runs", "compile, graphs, streams",
    "found by sanitizer",
)  # fmt: skip

Data = dict[str, Any]


def cpu_speed(data: Data) -> str:
    """One line for each shape; the memory of naive is that of the reference backend."""
    rows = {(row["shape"], row["order"], row["candidate"]): row for row in data["rows"]}
    ours = list(dict.fromkeys(row["candidate"] for row in data["rows"] if row["group"] == "ours"))
    lines = []
    for name in dict.fromkeys(row["shape"] for row in data["rows"]):
        label = _label(data, name)
        for backend in ours:
            mine = [rows.get((name, order, backend)) for order in ORDERS]
            naive = [rows.get((name, order, "naive")) for order in ORDERS]
            lines.append((
                label if len(ours) == 1 else f"{label}, {backend}",
                " / ".join(_ratio(row) for row in mine),
                " / ".join(_memory(row, ".2f") for row in mine),
                " / ".join(_memory(row, ".0f") for row in naive),
            ))  # fmt: skip
    header = ("shape", "times the speed of naive: forward / backward / double", "memory beyond results: ours", "naive")
    return table(header, lines)


def cpu_peers(data: Data) -> str:
    """The orders in which each library gave the right result, by shape; then the reasons of those that did not."""
    found = {(row["shape"], row["candidate"], row["order"]): row for row in data["rows"] if row["group"] != "naive"}
    candidates = list(dict.fromkeys(candidate for _, candidate, _ in found))
    reasons: dict[str, dict[str, None]] = {}  # the orders that each stands for
    lines = []
    for name in dict.fromkeys(shape for shape, _, _ in found):
        cells = []
        for candidate in candidates:
            rows = {order: found[name, candidate, order] for order in ORDERS}
            right = [order for order, row in rows.items() if row["status"] == "ok"]
            cells.append("all" if len(right) == len(ORDERS) else ", ".join(right) or "no")
            for order, row in rows.items():
                if row["status"] != "ok":
                    reasons.setdefault(f"{candidate}: {row['reason']}", {})[order] = None
        lines.append((_label(data, name), *cells))
    why = "\n".join(f"- {reason.rstrip('.')} ({', '.join(orders)})" for reason, orders in reasons.items())
    return f"{table(('shape', *candidates), lines)}\n\n{why}\n"


def gpu_ran(documents: list[Data]) -> str:
    """The newest commit of each backend on each GPU, from all runs at that commit; "not yet" where there is none."""
    runs: dict[tuple[str, str], Data] = {}
    for data in sorted(documents, key=lambda data: data["environment"].get("date", "")):
        if "gpu" not in data["environment"]:
            continue
        key = data["environment"]["gpu"], data["commit"]
        ran = {name: part for name, part in data["parts"].items() if part["status"] != "not run"}
        earlier = runs.pop(key, {"parts": {}})  # popped, so that the newest stands last
        runs[key] = {**data, "parts": {**earlier["parts"], **ran}}
    lines = []
    for backend in GPU_BACKENDS:
        newest = {
            gpu: data
            for (gpu, _), data in runs.items()
            if backend in data["parts"].get("environment", {}).get("backends", ())
        }
        for gpu, data in newest.items():
            environment, parts = data["environment"], data["parts"]
            versions = f"{environment['torch']}, {environment['packages'].get('triton', 'none')}"
            tests = tests_line(parts.get("tests", {}), backend)
            others = [_results_of(data, part, backend) for part in ("repeat", "capture", "sanitizer")]
            lines.append((f"`{backend}`", data["commit"][:10], gpu, environment["date"][:10], versions, tests, *others))
        if not newest:
            lines.append((f"`{backend}`", "", "not yet run on a GPU", *[""] * 6))
    return table(RAN_HEADER, lines)


def _results_of(data: Data, name: str, backend: str) -> str:
    part = data["parts"].get(name)
    if part is None:
        return "not run"
    if name == "sanitizer":
        tools = {
            key.split(",")[0]: value for key, value in part.get("tools", {}).items() if key.endswith(f" {backend}")
        }
        return ", ".join(f"{name} {'?' if t['problems'] is None else t['problems']}" for name, t in tools.items())
    results = [r for r in part.get("results", ()) if r[1] == backend]
    failed = sum(r[4] not in ("ok", "cannot") for r in results)
    return f"{sum(r[4] == 'ok' for r in results)} ok" + (f", **{failed} failed**" if failed else "")


def _label(data: Data, name: str) -> str:
    problem = Shape.from_dict(next(row["problem"] for row in data["rows"] if row["shape"] == name))
    return f"{name} ({problem.describe().replace(',', ', ')})"


def _ratio(row: Data | None) -> str:
    return f"{row['ratio']:.1f}" if row and row["ratio"] else "-"


def _memory(row: Data | None, form: str) -> str:
    return format(row["memory"]["ratio"], form) if row and row["memory"] else "-"


ONE_FILE: dict[str, Callable[..., str]] = {
    "cpu-speed": cpu_speed,
    "cpu-figures": figures_table,
    "cpu-peers": cpu_peers,
    "gpu-figures": figures_table,
    "gpu-speed": speed_table,
    "gpu-peers": peers_table,
}


def make(description: str, root: Path = ROOT) -> str:
    """The table that a comment describes. Raises ValueError for an unknown kind, or where there is no such file."""
    kind, pattern, *arguments = description.split()
    paths = sorted(root.glob(pattern))
    if kind == "gpu-ran":
        return gpu_ran([json.loads(path.read_text()) for path in paths])
    if kind not in ONE_FILE:
        raise ValueError(f"the kind of a table must be one of {', '.join((*ONE_FILE, 'gpu-ran'))}, got {kind!r}")
    if len(paths) != 1:
        raise ValueError(f"table {kind}: {pattern!r} must be one file, it is {len(paths)}")
    return ONE_FILE[kind](json.loads(paths[0].read_text()), *arguments)


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
        text = page.read_text()
        try:
            made = rewrite(text)
        except ValueError as error:
            print(f"tables: {page}: {error}", file=sys.stderr)
            return 2
        if made != text:
            stale.append(page)
            if not options.check:
                page.write_text(made)
    for page in stale:
        print(f"{'out of date' if options.check else 'rewritten'}: {page}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
