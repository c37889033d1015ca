"""The readable page of a gpu_check document, and the tables that docs take from it. Every number is from the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.shapes import SHAPES

from .figures import ORDERS, Rows

Data = dict[str, Any]

PEERS = ("sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math", "flex", "natten-cutlass", "natten-hopper")


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def page(data: Data) -> str:
    """Everything that a reader wants first: what ran, what failed, figures, then times."""
    ended = "" if data["finished"] else "\n\n**This run did not end: below is what it had when this was written.**"
    sections = [
        f"# gpu_check{ended}",
        _environment(data),
        "## Parts\n\n" + _parts(data),
        *_problems(data),
        "## Figures to reach\n\n" + figures_table(data),
    ]
    if data["rates"]:
        sections.append("## Rates measured in this run\n\n" + _rates(data))
    for precision in dict.fromkeys(row["precision"] for row in data["rows"]):
        sections.append(f"## {precision}: operators alone\n\n" + speed_table(data, precision))
        sections.append(f"## {precision}: whole steps, time over ours\n\n" + peers_table(data, precision))
    if data["cells_not_run"]:
        sections.append("## Not run: out of time\n\n" + "\n".join(f"- {cell}" for cell in data["cells_not_run"]))
    return "\n\n".join(sections) + "\n"


def figures_table(data: Data) -> str:
    """Met or missed, for every figure."""
    verdict = {True: "met", False: "**missed**", None: "not measured"}
    rows = [(verdict[f["met"]], f["backend"], f["name"], f["target"], f["text"]) for f in data["figures"]]
    return table(("", "backend", "figure", "goal", "measured"), rows)


def speed_table(data: Data, precision: str) -> str:
    """Our backends: microseconds of each operator alone and percent of its floor."""
    rows = Rows(data["rows"], precision)
    backends = _ours(data)
    lines = []
    for name in rows.shapes:
        scaled = next(row["scaled"] for row in data["rows"] if row["shape"] == name)
        line: list[object] = [name, SHAPES[name].describe() + (f" ({scaled})" if scaled != "as it is" else "")]
        for backend in backends:
            cells = [_alone(rows.get(name, order, backend)) for order in ORDERS]
            line.append(" / ".join(cells))
        lines.append(line)
    header = [f"{name}: forward / backward / double backward, us (percent of the floor)" for name in backends]
    return table(("shape", "problem", *header), lines)


def peers_table(data: Data, precision: str) -> str:
    """Whole steps: every other candidate's time over that of our fastest backend."""
    rows = Rows(data["rows"], precision)
    ours = _ours(data)
    peers = [name for name in PEERS if name in rows.candidates]
    lines = []
    for name in rows.shapes:
        for order in ORDERS:
            mine = [r for b in ours if (r := rows.get(name, order, b))]
            best = min(mine, key=lambda row: row["median"], default=None)
            line: list[object] = [name, order]
            if best is None:
                line += ["-", "-", "-"]
            else:
                memory = best["memory"]["ratio"] if best["memory"] else None
                time = f"{best['candidate']} {1e6 * best['median']:.0f}"
                line += [time, _number(memory, ".2f"), _number(best["ratio"])]
            for peer in peers:
                ratios = [rows.ratio(lambda c, peer=peer: c == peer, b, order, [name]).get(name) for b in ours]
                line.append(_number(max((r for r in ratios if r), default=None)))
            lines.append(line)
    header = ("shape", "step", "ours, us", "memory beyond / returned", "fastest naive", *peers)
    return table(header, lines)


def tests_line(part: Data, backend: str) -> str:
    """Counts of the operator tests of one backend."""
    counts = part.get("backends", {}).get(backend)
    if not counts:
        return "not run"
    names = ("passed", "failed", "lost", "skipped", "not_run")
    text = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in names if counts.get(name))
    return text or "none"


def _environment(data: Data) -> str:
    environment, machine = data["environment"], data["machine"]
    facts = {
        "commit": data["commit"],
        "date": environment.get("date"),
        "GPU": environment.get("gpu") or machine.get("gpu"),
        "driver": machine.get("driver"),
        "CUDA": environment.get("cuda"),
        "torch": environment.get("torch"),
        "triton": environment.get("packages", {}).get("triton"),
        "natten": environment.get("packages", {}).get("natten"),
        "python": environment.get("python"),
        "cpu": environment.get("cpu"),
        "nvcc": machine.get("nvcc"),
        "compute-sanitizer": machine.get("compute-sanitizer"),
    }
    return table(("", ""), [(name, value) for name, value in facts.items() if value])


def _parts(data: Data) -> str:
    lines = []
    for name, part in data["parts"].items():
        seconds = f"{part['seconds']:.0f}" if part.get("seconds") is not None else ""
        lines.append((name, part["status"], seconds, part.get("summary", ""), part.get("reason", "")))
    return table(("part", "status", "s", "what", "why"), lines)


def _problems(data: Data) -> list[str]:
    lines = []
    for name, part in data["parts"].items():
        lines += [f"- {name}: {text}" for text in part.get("failures", ())]
    for row in data["rows"]:
        if row["status"] in ("wrong", "lost") or (row["group"] == "ours" and row["status"] == "cannot"):
            what = f"{row['candidate']} on {row['shape']}, {row['precision']}, {row['order']}"
            lines.append(f"- benchmark: {what}: {row['status']}: {row['reason']}")
    return ["## What is wrong\n\n" + "\n".join(dict.fromkeys(lines))] if lines else []


def _rates(data: Data) -> str:
    lines = [
        (name, f"{2 * r['fmas'] / 1e12:.1f}", f"{r['bytes'] / 1e12:.2f}", f"{r['exps'] / 1e12:.2f}")
        for name, r in data["rates"].items()
    ]
    return table(("", "matrix product, TFLOP/s", "copy, TB/s", "exponentials (by the clock), T/s"), lines)


def _ours(data: Data) -> list[str]:
    return list(dict.fromkeys(row["candidate"] for row in data["rows"] if row["group"] == "ours"))


def _alone(row: Data | None) -> str:
    if not row or not row["alone"]:
        return "-"
    return f"{1e6 * row['alone']:.0f} ({row['alone_percent']:.0f}%)"


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
