"""A result: rows of measurements with the rates and the machine they belong to, in memory and as a file.

The file is JSON with one row to a line. It holds what was measured; medians, ratios and shares of the floor are
computed from that when it is read, by the same code that computed them when it was written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .floors import Rates, stage_floor, step_floor, step_fmas
from .memory import Memory
from .precision import PRECISIONS
from .problem import ORDERS
from .shapes import Shape
from .timing import Timing

DIGITS = 6  # of a time in the file
SAMPLES = 5  # of a time in the file, at most: of more, the quartiles with the least and the largest


@dataclass
class Row:
    """One candidate on one shape and order.

    ``status`` is "ok", "unchecked" (the float64 reference did not fit), "wrong" or "cannot"; ``reason`` says why.
    ``error`` is the largest of its results' (``benchmarks.check``). ``alone`` is the time of the order's operator
    without the others, ``host`` the seconds in which Python queues a step on a GPU.

    ``relate`` computes the rest: ``ratio`` is the fastest naive form's time over this one's; ``forwards`` is this
    one's, ``alone_forwards`` its operator's, over the time of the same candidate's forward.
    """

    shape: Shape
    order: str
    candidate: str
    group: str
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    timing: Timing | None = None
    alone: Timing | None = None
    alone_reason: str = ""
    host: float | None = None
    memory: Memory | None = None
    memory_reason: str = ""
    ratio: float | None = None
    forwards: float | None = None
    alone_forwards: float | None = None
    floor: float = 0.0
    bound: str = ""
    floor_percent: float | None = None
    fma_percent: float | None = None
    alone_percent: float | None = None

    @property
    def cell(self) -> tuple[str, str]:
        """What rows that compare with each other have in common: shape and order."""
        return self.shape.name, self.order

    @property
    def failed(self) -> bool:
        """Whether this is ours and did not give the right result."""
        return self.group == "ours" and self.status in ("wrong", "cannot")

    def describe(self) -> str:
        return f"{self.candidate} on {self.shape.name}, {self.order}: {self.status}: {self.reason}"


def relate(rows: list[Row], rates: Rates, itemsize: int) -> None:
    """Fill in the ratios to naive and to the forward, and the percentages of the floor and of the multiply-add rate."""
    naive: dict[tuple[str, str], float] = {}
    forward = {
        (row.shape.name, row.candidate): row.timing.median for row in rows if row.order == "forward" and row.timing
    }
    for row in rows:
        if row.group == "naive" and row.timing:
            naive[row.cell] = min(row.timing.median, naive.get(row.cell, float("inf")))
    for row in rows:
        row.floor, row.bound = step_floor(row.shape, row.order, itemsize, rates)
        once = forward.get((row.shape.name, row.candidate))
        if row.timing:
            median = row.timing.median
            row.ratio = naive[row.cell] / median if row.cell in naive else None
            row.forwards = median / once if once else None
            row.floor_percent = 100 * row.floor / median
            row.fma_percent = 100 * step_fmas(row.shape, row.order) / rates.fmas / median
        if row.alone:
            row.alone_forwards = row.alone.median / once if once else None
            row.alone_percent = 100 * stage_floor(row.shape, row.order, itemsize, rates)[0] / row.alone.median


@dataclass
class Record:
    """All rows are in one ``precision`` (of ``benchmarks.precision``) on one machine.

    ``rates`` is None while nothing was measured; ``environment`` is that of ``benchmarks.environment``; ``more`` is
    what else the file holds.
    """

    environment: dict[str, Any]
    precision: str
    rates: Rates | None = None
    rows: list[Row] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {row.shape.name: row.shape for row in self.rows}

    @property
    def candidates(self) -> list[str]:
        return list(dict.fromkeys(row.candidate for row in self.rows))

    @property
    def orders(self) -> list[str]:
        """The orders of differentiation that were measured."""
        return [order for order in ORDERS if any(row.order == order for row in self.rows)]

    @property
    def ours(self) -> list[str]:
        """Our backends among the candidates."""
        return list(dict.fromkeys(row.candidate for row in self.rows if row.group == "ours"))

    @property
    def cells(self) -> dict[tuple[str, str], dict[str, Row]]:
        """Rows by shape and order, then by candidate."""
        cells: dict[tuple[str, str], dict[str, Row]] = {}
        for row in self.rows:
            cells.setdefault(row.cell, {})[row.candidate] = row
        return cells

    def add(self, rows: list[Row], rates: Rates) -> None:
        """Take over rows, which replace those of the same candidate in the same cell, and higher rates."""
        self.rates = rates.best(self.rates or rates)
        self.rows = list({(*row.cell, row.candidate): row for row in [*self.rows, *rows]}.values())
        relate(self.rows, self.rates, PRECISIONS[self.precision].itemsize)

    def write(self, path: Path) -> None:
        rates = self.rates and self.rates.to_dict()
        head = {**self.more, "environment": self.environment, "precision": self.precision, "rates": rates}
        text = json.dumps(head, indent=1).removesuffix("\n}")
        lists = {"shapes": [s.to_dict() for s in self.shapes.values()], "rows": map(_to_dict, self.rows)}
        for name, values in lists.items():
            text += f',\n "{name}": [' + ",".join(f"\n{json.dumps(value)}" for value in values) + "]"
        write_whole(path, text + "\n}\n")

    @staticmethod
    def read(path: Path) -> Record:
        """Raises OSError where there is no such file, ValueError where it is no result."""
        try:
            data = json.loads(path.read_text())
            shapes = {shape["name"]: Shape.from_dict(shape) for shape in data.pop("shapes")}
            rows, rates = [_from_dict(row, shapes) for row in data.pop("rows")], data.pop("rates")
            record = Record(data.pop("environment"), data.pop("precision"), more=data)
            if rates:
                record.add(rows, Rates(**rates))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no result of a benchmark: {type(error).__name__}: {error}") from None
        return record


def output_file(text: str) -> Path:
    """A file to write at the end of a run; of argparse, which says before the run what is wrong with it."""
    path = _output(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text!r}")
    return path


def output_folder(text: str) -> Path:
    """A folder to write to, made if need be; of argparse."""
    path = _output(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, got the file {text!r}")
    return path


def _output(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is '', which names nothing (an unset variable?)")
    path = Path(text)
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} can't be written: {str(existing)!r} is no folder to write to")
    return path


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all, whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _to_dict(row: Row) -> dict[str, Any]:
    """Plain data, without what is empty or computed."""
    data: dict[str, Any] = {"shape": row.shape.name}
    names = ("order", "candidate", "group", "reason", "alone_reason", "memory_reason")
    data |= {name: getattr(row, name) for name in names if getattr(row, name)}
    if row.status != "ok":
        data["status"] = row.status
    data |= {name: float(f"{value:.2g}") for name in ("error", "host") if (value := getattr(row, name)) is not None}
    for name in ("timing", "alone"):
        if timing := getattr(row, name):
            samples = timing.samples
            if len(samples) > SAMPLES:
                samples = [min(samples), *statistics.quantiles(samples, n=4, method="inclusive"), max(samples)]
            data[name] = [float(f"{sample:.{DIGITS}g}") for sample in samples]
    if row.memory:
        data["memory"] = [row.memory.beyond, row.memory.returned, row.memory.step]
    return data


def _from_dict(data: dict[str, Any], shapes: dict[str, Shape]) -> Row:
    timings = {name: Timing(data[name]) for name in ("timing", "alone") if name in data}
    memory = {"memory": Memory(*data["memory"])} if "memory" in data else {}
    return Row(**{**data, "shape": shapes[data["shape"]], **timings, **memory})
