"""A made-up result of gpu_check, of an H100 on which everything was measured."""

from benchmarks.runner import Row
from benchmarks.shapes import SHAPES
from benchmarks.timing import Timing

PERCENT = {"triton": {"forward": 70.0, "backward": 50.0, "double": 40.0},
           "cuda": {"forward": 80.0, "backward": 65.0, "double": 55.0}}  # fmt: skip


def row(shape, order, candidate, group, seconds, precision="bfloat16", which="quick", memory=None, **more):
    """One row as the document holds it; ``seconds`` of the step, the operator alone takes half of it."""
    timings = {"timing": Timing([seconds]), "alone": Timing([seconds / 2])} if seconds else {}
    made = Row(SHAPES[shape], order, candidate, group, **timings, **more)
    fields = {k: v for k, v in made.to_dict().items() if k not in ("problem", "errors")}
    fields["memory"] = memory and {"beyond": 1, "returned": 1, "step": 1, "ratio": memory}
    return {**fields, "precision": precision, "pass": which}


def rows():
    """ours: cuda 1 ms, triton 1.5 ms on every shape; peers between 3 and 20 times that."""
    made = []
    for name, shape in SHAPES.items():
        for order in ("forward", "backward", "double"):
            for backend, seconds in (("triton", 1.5e-3), ("cuda", 1e-3)):
                percent = PERCENT[backend][order]
                more = {"ratio": 6.0, "alone_percent": percent, "memory": 0.2}
                made.append(row(name, order, backend, "ours", seconds, **more))
                made.append(row(name, order, backend, "ours", seconds, which="compiled", **more))
            made.append(row(name, order, "sdpa-math", "peer", 20e-3))
            if order != "double":
                made.append(row(name, order, "sdpa-efficient", "peer", 6e-3))
                made.append(row(name, order, "flex", "peer", 4.5e-3, which="compiled"))
                if shape.kind == "neighborhood":
                    made.append(row(name, order, "natten-cutlass", "peer", 4e-3))
    return made


def document(made_rows=None):
    parts = {
        "environment": {"status": "ok", "backends": ["triton", "cuda"], "seconds": 5.0},
        "tests": {
            "status": "failed", "seconds": 100.0, "failures": ["tests/x.py::test_y: no"],
            "backends": {"triton": {"collected": 10, "passed": 9, "skipped": 1},
                         "cuda": {"collected": 10, "passed": 8, "failed": 1, "not_run": 1}},
        },
        "repeat": {"status": "ok", "results": [["repeat", "triton", "bfloat16", "nat-64", "ok", ""],
                                               ["repeat", "cuda", "bfloat16", "nat-64", "wrong", "run 3"]]},
        "sanitizer": {"status": "ok", "tools": {
            "memcheck, triton": {"problems": 0}, "racecheck, triton": {"problems": 2},
            "memcheck, cuda": {"problems": None},
        }},
    }  # fmt: skip
    return {
        "commit": "0123456789abcdef", "arguments": {}, "machine": {"driver": "580.1"}, "backends": {},
        "environment": {"gpu": "NVIDIA H100", "date": "2026-11-30T10:00:00+00:00", "torch": "2.11.0+cu130",
                        "packages": {"triton": "3.6.0"}},
        "parts": parts, "rates": {"bfloat16": {"fmas": 4e14, "exps": 3.7e12, "bytes": 3e12}},
        "rows": rows() if made_rows is None else made_rows, "cells_not_run": ["nat-8, tf32, compiled"],
        "figures": [], "finished": True,
    }  # fmt: skip
