"""Child: every order once on odd little shapes, checked against float64 on the CPU: what compute-sanitizer watches of
Triton's kernels; of CUDA's it is every_kernel.cpp.

On the CPU, because a sanitizer is to see few kernels but ours.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from benchmarks.candidates import ours
from benchmarks.check import compare, expect
from benchmarks.problem import ORDERS, STEPS, Inputs, make_inputs
from benchmarks.shapes import SHAPES, Shape

# Borders, residue classes of unequal length, odd token counts, head_dims that are no power of two.
ODD = (
    replace(SHAPES["nat-16"], batch=1, size=(15, 17), heads=2, head_dim=32),
    replace(SHAPES["nat-1024"], batch=1, size=(14, 15), heads=2, dilations=(1, 2)),
    replace(SHAPES["cifar-d1"], batch=1, size=(10, 10), window=5, heads=2, head_dim=24),
    replace(SHAPES["church-g6"], batch=1, size=(16, 16), window=16, heads=1),
    replace(SHAPES["vitgan-d"], batch=1, heads=2, head_dim=72),
    replace(SHAPES["cross-256"], batch=1, size=(70,), heads=2, head_dim=96),
)
# racecheck takes minutes for those; these have a few blocks each.
SMALLEST = (
    Shape("neighborhood", "neighborhood", (5, 9), 1, 16, "", window=3, table=True),
    Shape("dilated-l2", "neighborhood", (7, 9), 1, 32, "", window=3, dilations=(2,), table=True, score="l2"),
    Shape("full", "full", (40,), 1, 64, ""),
    Shape("grid", "grid", (10, 10), 1, 72, "", window=5, table=True),
    Shape("wide", "full", (20,), 1, 256, ""),
    Shape("two-stages", "full", (200,), 1, 96, ""),
)


def check(shape: Shape, backend: str, device: torch.device, precision: str) -> str:
    """What is wrong in any order; empty if nothing is."""
    dtype = getattr(torch, precision)
    on_cpu = make_inputs(shape, dtype, torch.device("cpu"))
    inputs, attend = _moved(on_cpu, device), ours(backend)(shape, device, dtype)
    wrong = []
    for order in ORDERS:
        results = {name: result.cpu() for name, result in STEPS[order](attend, inputs).items()}
        _, problem = compare(results, expect(shape, on_cpu, order), precision)
        wrong += [f"{order}: {problem}"] * bool(problem)
    return "; ".join(wrong)


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    moved = {name: None if x is None else x.detach().to(device).requires_grad_() for name, x in vars(inputs).items()}
    if inputs.key is inputs.query:
        moved["key"] = moved["query"]
    return Inputs(**moved)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--smallest", action="store_true")
    options = parser.parse_args()
    failed = 0
    for precision in ("bfloat16",) if options.smallest else ("bfloat16", "float32"):
        for shape in SMALLEST if options.smallest else ODD:
            wrong = check(shape, options.backend, torch.device(options.device), precision)
            print(f"{shape.name} {shape.describe()}, {precision}: {wrong or 'right'}", flush=True)
            failed += bool(wrong)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
