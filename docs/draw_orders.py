"""Draws the three orders: what each operator takes and gives, as `natten_ext.orders` declares them.

    python docs/draw_orders.py        # writes docs/img/orders.png

Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

from natten_ext.orders import BACKWARD, DOUBLE_BACKWARD, FORWARD, Order

matplotlib.use("agg")
import matplotlib.pyplot as plt

INPUTS = {"query": "q", "key": "k", "value": "v", "bias": "table"}
CHOICES = ("neighborhood", "l2", "scale", "return_lse", "needs")
PANELS = (
    (FORWARD, "forward", "attention"),
    (BACKWARD, "backward", "a gradient"),
    (DOUBLE_BACKWARD, "double backward", "the gradient of a penalty on the gradient"),
)


def symbol(name: str) -> str:
    """Of an operand or a result, as docs/double_backward.md writes it."""
    names = {**INPUTS, "output": "O", "lse": "L", "natural_lse": "log-sum-exp", "grad_output": "dO", "grad_lse": "y"}
    if name in names:
        return names[name]
    prefix, _, of = name.partition("_")
    return f"{ {'cot': 'g', 'grad': 'd'}[prefix] }{'(' + symbol(of) + ')' if of.startswith('grad') else symbol(of)}"


def rows(order: Order) -> tuple[list[str], list[str]]:
    """The operands and the results, a line for each kind."""
    operands = [name for name in order.types if name not in CHOICES]
    kinds = {
        "inputs": [name for name in operands if name in INPUTS],
        "saved by the forward": [name for name in operands if name in ("output", "lse")],
        "gradient that comes down": [name for name in operands if name.startswith("grad")],
        "cotangents of the gradients": [name for name in operands if name.startswith("cot")],
    }
    taken = [f"{kind}:  {'  '.join(map(symbol, names))}" for kind, names in kinds.items() if names]
    given = list(order.results)
    return taken, ["  ".join(map(symbol, given[i : i + 4])) for i in range(0, len(given), 4)]


def main() -> None:
    figure, axes = plt.subplots(figsize=(11, 3.8), layout="constrained")
    axes.set(xlim=(0, 3), ylim=(0, 1))
    axes.axis("off")
    for place, (order, title, what) in enumerate(PANELS):
        taken, given = rows(order)
        centre = place + 0.5
        axes.text(centre, 0.97, "\n".join(taken), ha="center", va="top", fontsize=8.5, linespacing=1.6)
        box = {"boxstyle": "round,pad=0.7", "facecolor": "#e7f5ff", "edgecolor": "#1864ab"}
        axes.text(centre, 0.42, f"{title}\n{what}", ha="center", va="center", fontsize=9.5, bbox=box)
        axes.text(centre, 0.17, "\n".join(given), ha="center", va="top", fontsize=8.5, linespacing=1.6)
        for start, end in ((0.67, 0.55), (0.30, 0.19)):
            axes.annotate("", (centre, end), (centre, start), arrowprops={"arrowstyle": "->", "color": "0.3"})
    figure.savefig(Path(__file__).parent / "img" / "orders.png", dpi=110)


if __name__ == "__main__":
    main()
