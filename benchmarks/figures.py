"""Figures to reach: what was aimed at, what was measured, and whether that is met. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One of the figures to reach. ``met`` is None where it was not measured."""

    backend: str
    name: str
    target: str
    value: float | None
    met: bool | None
    text: str

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]


def figures_block(figures: list[Figure]) -> str:
    """The figures to reach as a table of plain text."""
    lines = ["Figures to reach"]
    for figure in figures:
        lines.append(f"  {figure.verdict:<8}{figure.backend:<8}{figure.name:<54}{figure.target:>8}   {figure.text}")
    return "\n".join(lines)


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
