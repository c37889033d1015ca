"""The table that attn_bench prints."""

from __future__ import annotations

from .record import Row
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


def describe_features(shape: Shape) -> str:
    """What a query attends, score and table of a shape in words."""
    what = {
        "full": "full attention",
        "grid": f"grid {'x'.join(map(str, shape.kernel))}",
        "neighborhood": f"neighborhood {'x'.join(map(str, shape.kernel))}, dilations {shape.dilations}",
    }[shape.kind]
    more = {"stride": (shape.stride, 1), "causal": (shape.causal, False), "shift": (shape.shift, 0)}
    what += "".join(f", {name} {value}" for name, (value, usual) in more.items() if value != usual)
    features = [what, shape.score if shape.score != "dot" else "", "tied" if shape.tied else ""]
    features.append("table" if shape.table else "no table")
    return ", ".join(filter(None, features))


def heading(shape: Shape) -> str:
    """What stands above the rows of a shape."""
    return f"\n{shape.name}: {shape.describe()}  {describe_features(shape)}  [{how_scaled(shape)}]\n{_HEADER}"


def order_block(rows: list[Row]) -> str:
    """The rows of one order."""
    floor = f"  {rows[0].order:<9}{'(floor)':<15}{1e3 * rows[0].floor:>9.3f}  bound by {rows[0].bound}"
    return "\n".join([floor, *map(_line, rows)])


def _line(row: Row) -> str:
    start = f"  {'':<9}{row.candidate:<15}"
    if row.timing is None:
        status = {"wrong": "WRONG", "ok": "right, not timed"}.get(row.status, row.status)
        return f"{start}{status}{': ' * bool(row.reason)}{row.reason}"
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
