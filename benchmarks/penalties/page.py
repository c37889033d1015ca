"""The tables of the study; docs/penalties.md has them as well (``benchmarks.tables``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

from benchmarks.tables import table

MODES = ("exact", "finite-difference")
MEASURES = ("bias", "error", "scatter")
GOAL = 1.3  # exact over estimated, of a step


def accuracy_table(rows: list[dict]) -> str:
    """A line for each way to compute the penalty, columns for the training before and the precision."""
    columns = [(step, name) for step in dict.fromkeys(row["step"] for row in rows) for name in ("fp32", "bf16")]
    ways: dict[str, dict[tuple[int, str], str]] = {}
    for row in rows:
        way = row["mode"] if row["sigma"] is None else f"{row['mode']}, {row['sigma']:g}"
        exact = "fp32" if row["precision"] == "fp64" else row["precision"]
        numbers = " / ".join(f"{row[name]:.2g}" if row[name] < 100 else f"{row[name]:.0f}" for name in MEASURES)
        ways.setdefault(way, {})[row["step"], exact] = f"{numbers} / {row['cosine']:.2f}"
    header = ("R1", *(f"step {step}, {name}" for step, name in columns))
    return table(header, [(way, *(cells.get(column, "") for column in columns)) for way, cells in ways.items()])


def cost_table(rows: list[dict]) -> str:
    header = ("tokens", "R1 and R2", "attention", "update, ms", "spread", "peak memory, MiB", "time", "memory")
    lines = []
    for row in rows:
        exact = next(r for r in rows if (r["tokens"], r["mode"], r["attention"]) == (row["tokens"], "exact", "fused"))
        lines.append(
            (
                row["tokens"], row["mode"] or "none", row["attention"], f"{1e3 * row['seconds']:.0f}",
                f"{100 * row['spread']:.0f} %", f"{row['peak_mib']:.0f}",
                f"{row['seconds'] / exact['seconds']:.2f}", f"{row['peak_mib'] / exact['peak_mib']:.2f}",
            )
        )  # fmt: skip
    ratios = ", ".join(f"{ratio:.2f} ({tokens} tokens)" for tokens, ratio in exact_over_estimated(rows).items())
    return f"{table(header, lines)}\n\nexact / finite differences, time: {ratios}; goal {GOAL}"


def exact_over_estimated(rows: list[dict]) -> dict[int, float]:
    """Time of a fused update, by number of tokens."""
    seconds = {(row["tokens"], row["mode"]): row["seconds"] for row in rows if row["attention"] == "fused"}
    return {tokens: s / seconds[tokens, MODES[1]] for (tokens, mode), s in seconds.items() if mode == "exact"}


def curve_table(rows: list[dict]) -> str:
    found = runs(rows)
    times = [point["seconds"] for point in next(iter(found.values()))]
    lines = [
        (mode, seed, *(f"{point['distance']:.3f}" for point in points), points[-1]["step"])
        for (mode, seed), points in found.items()
    ]
    for mode in dict.fromkeys(mode for mode, _ in found):
        columns = zip(*(points for (of, _), points in found.items() if of == mode), strict=True)
        medians = [f"{median(point['distance'] for point in column):.3f}" for column in columns]
        lines.append((mode, "median", *medians, ""))
    return table(("mode", "seed", *(f"{time:.0f} s" for time in times), "steps"), lines)


def runs(rows: Iterable[dict]) -> dict[tuple[str, int], list[dict]]:
    """The points of each run, by mode and seed."""
    found: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        found.setdefault((row["mode"], row["seed"]), []).append(row)
    return found


TABLES: dict[str, Callable[[list[dict]], str]] = {
    "accuracy": accuracy_table,
    "cost": cost_table,
    "curves": curve_table,
}
PARTS = tuple(TABLES)


def page(result: dict) -> str:
    """Everything that was measured, with what it was measured on."""
    parts = []
    for name, make in TABLES.items():
        if name in result:
            told = result[name]["environment"]
            where = f"{told['cpu']}, torch {told['torch']}, commit {told['commit']}"
            parts.append(f"## {name}\n\n{where}\n\n{make(result[name]['rows'])}\n")
    return "\n".join(parts)
