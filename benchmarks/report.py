"""The printed table, the figures to reach, and the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .figures import Figure, geometric_mean
from .floors import Rates
from .problem import ORDERS
from .runner import Row
from .shapes import Shape
from .suites import how_scaled

_HEADER = (
    f"  {'order':<9}{'candidate':<15}{'ms':>9}{'+-':>5}{'n':>4}  {'naive/it':>8}{'floor':>8}{'FMA':>6}"
    f"{'beyond':>10}{'/returned':>10}{'step MiB':>10}"
)

LEGEND = """\
+-         half the distance between the quartiles, of n samples
naive/it   fastest naive form's time over this one's: above 1 is faster than naive
floor      percent of the least possible time by this machine's rates; FMA: useful multiply-adds, percent of the peak
beyond     peak MiB of that order's operator alone beyond what it got and returned (what earlier orders saved counts);
           /returned: relative to the output or gradients it returns
step MiB   peak of the whole step beyond its inputs"""


def shape_block(shape: Shape, rows: list[Row]) -> str:
    """The table of one shape."""
    what = {
        "full": "full attention",
        "grid": f"grid {shape.window}x{shape.window}",
        "neighborhood": f"neighborhood {shape.window}x{shape.window}, dilations {shape.dilations}",
    }[shape.kind]
    features = [what, shape.score if shape.score != "dot" else "", "tied" if shape.tied else ""]
    features.append("table" if shape.table else "no table")
    lines = [
        f"{shape.name}: {shape.describe()}  {', '.join(filter(None, features))}  [{how_scaled(shape)}]",
        _HEADER,
    ]
    for order in ORDERS:
        of_order = [row for row in rows if row.order == order]
        if of_order:
            lines.append(f"  {order:<9}{'(floor)':<15}{1e3 * of_order[0].floor:>9.3f}  bound by {of_order[0].bound}")
        lines += [_line(row) for row in of_order]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    start = f"  {'':<9}{row.candidate:<15}"
    if row.timing is None:
        return f"{start}{'WRONG' if row.status == 'wrong' else 'cannot'}: {row.reason}"
    line = f"{start}{1e3 * row.timing.median:>9.3f}{_spread(row):>5}{len(row.timing.samples):>4}  "
    line += f"{row.ratio:>7.2f}x" if row.ratio else f"{'-':>8}"
    line += f"{row.floor_percent:>7.1f}%{row.fma_percent:>5.1f}%"
    if row.memory:
        line += f"{row.memory.beyond / 2**20:>10.2f}{row.memory.ratio:>10.2f}{row.memory.step / 2**20:>10.2f}"
    elif row.memory_reason:
        line += f"  memory: cannot: {row.memory_reason}"
    return line + (f"  unchecked: {row.reason}" if row.status == "unchecked" else "")


def _spread(row: Row) -> str:
    return f"{row.timing.spread:.0%}" if len(row.timing.samples) > 1 else "-"


def figures_to_reach(rows: list[Row]) -> list[Figure]:
    """The CPU figures of the benchmark for each of our backends (see the module's ``_figures_of``)."""
    backends = list(dict.fromkeys(row.candidate for row in rows if row.group == "ours"))
    return [figure for backend in backends for figure in _figures_of(backend, rows)]


def _figures_of(backend: str, rows: list[Row]) -> list[Figure]:
    mine = [row for row in rows if row.candidate == backend]
    figures = []

    def add(name: str, target: str, value: float | None, met: bool, text: str) -> None:
        figures.append(Figure(backend, name, target, value, met if value is not None else None, text))

    for order in ORDERS:
        ratios = {row.shape.name: row.ratio for row in mine if row.order == order and row.ratio}
        if ratios:
            mean = geometric_mean(ratios.values())
            text = f"{mean:.2f}x of {len(ratios)} shapes{_against_reference(mine, rows, order)}"
            add(f"{order}: naive / ours, geometric mean", ">= 5", mean, mean >= 5, text)
    for order in ORDERS:
        ratios = {row.shape.name: row.ratio for row in mine if row.order == order and row.ratio}
        if ratios:
            worst = min(ratios, key=ratios.__getitem__)
            value = ratios[worst]
            add(f"{order}: naive / ours, least", ">= 1.5", value, value >= 1.5, f"{value:.2f}x on {worst}")
    for order in ORDERS:
        value = _against("sdpa", "full-1k", order, mine, rows)
        if value is not None:
            add(f"{order}: fused SDPA / ours on full-1k", ">= 0.9", value, value >= 0.9, f"{value:.2f}x")
    shares = {
        row.shape.name: row.fma_percent
        for row in mine
        if row.order == "forward" and row.shape.kind == "neighborhood" and row.fma_percent
    }
    if shares:
        worst = min(shares, key=shares.__getitem__)
        each = ", ".join(f"{name} {share:.0f}" for name, share in shares.items())
        value = shares[worst]
        add("neighborhood forward, percent of the FMA peak, least", ">= 40", value, value >= 40, each)
    for order in ORDERS:
        ratios = {row.shape.name: row.memory.ratio for row in mine if row.order == order and row.memory}
        if ratios:
            worst = max(ratios, key=ratios.__getitem__)
            value = ratios[worst]
            text = f"{value:.2f} on {worst}; naive {_naive_memory(rows, order)}"
            add(f"{order}: memory beyond / returned, largest", "<= 0.25", value, value <= 0.25, text)
    return figures


def _against(peer: str, shape: str, order: str, mine: list[Row], rows: list[Row]) -> float | None:
    def median(among: Iterable[Row], candidate: str | None) -> float | None:
        for row in among:
            if row.shape.name == shape and row.order == order and candidate in (None, row.candidate) and row.timing:
                return row.timing.median
        return None

    ours, theirs = median(mine, None), median(rows, peer)
    return theirs / ours if ours and theirs else None


def _against_reference(mine: list[Row], rows: list[Row], order: str) -> str:
    """The mean against one form of naive alone, the reference backend, for comparison."""
    naive = {r.shape.name: r.timing.median for r in rows if (r.candidate, r.order) == ("naive", order) and r.timing}
    ratios = [
        naive[r.shape.name] / r.timing.median for r in mine if r.order == order and r.timing and r.shape.name in naive
    ]
    return f"; {geometric_mean(ratios):.2f}x against the reference backend alone" if ratios else ""


def _naive_memory(rows: list[Row], order: str) -> str:
    ratios = [row.memory.ratio for row in rows if row.candidate == "naive" and row.order == order and row.memory]
    return f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else "not measured"


def write_json(
    path: Path, environment: dict[str, Any], arguments: dict[str, Any], rates: Rates, rows: list[Row]
) -> None:
    """Everything, raw samples included. Written after each shape, whole or not at all."""
    document = {
        "environment": environment,
        "arguments": arguments,
        "rates": rates.to_dict(),
        "rows": [row.to_dict() for row in rows],
        "figures": [asdict(figure) for figure in figures_to_reach(rows)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)
