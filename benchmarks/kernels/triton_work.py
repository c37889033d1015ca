"""How much of what the kernels compute counts.

    python -m benchmarks.kernels.triton_work --dtype bfloat16

prints, for every named shape and order, the share of the multiply-adds issued that belong to a query, a key it sees,
and a channel that exists; the rest is on masked pairs and on padding.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.shapes import SHAPES
from natten_ext.backends.triton.launch import Launch
from natten_ext.backends.triton.problem import KEY, QUERY, displaced_pairs
from natten_ext.orders import FORWARD

from .triton_problems import DTYPES, ORDERS, torch_dtype

# (step, owner of the tiles, products per pair) of every order.
PASSES = {
    "forward": (("forward", QUERY, 2),),
    "backward": (("backward_query", QUERY, 4), ("backward_key", KEY, 4), ("table", QUERY, 2)),
    "double": (("double_query", QUERY, 14), ("double_key", KEY, 8), ("double_table", QUERY, 5)),
}


def useful_share(launch: Launch, order: str) -> float:
    """Useful multiply-adds over those issued, in all passes of an order."""
    useful = issued = 0
    for step, owner, products in PASSES[order]:
        table = step.endswith("table")
        if table and launch.table is None:
            continue
        static, tiles, _ = launch.static(step, owner)
        pairs = displaced_pairs(launch.problem, tiles) if table else tiles.issued
        useful += products * launch.problem.pairs() * launch.problem.head_dim
        issued += products * pairs * sum(static.chunks)
    return useful / issued


def launch_of(shape: Any, dtype: torch.dtype) -> Launch:
    """The launch of a named shape, on tensors without values."""
    query, key = (torch.empty(size, dtype=dtype, device="meta") for size in (shape.query_shape, shape.key_shape))
    bias = torch.empty(shape.table_shape, dtype=dtype, device="meta") if shape.table else None
    choices = shape.neighborhood.encode(), shape.score == "l2", shape.head_dim**-0.5
    return Launch(FORWARD.operands(query, key, key, bias, *choices, False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    dtype = torch_dtype(parser.parse_args().dtype)
    print(f"| shape | {' | '.join(ORDERS)} |\n| --- |{' ---: |' * len(ORDERS)}")
    for name, shape in SHAPES.items():
        launch = launch_of(shape, dtype)
        print(f"| {name} | {' | '.join(f'{100 * useful_share(launch, order):.0f}' for order in ORDERS)} |")


if __name__ == "__main__":
    main()
