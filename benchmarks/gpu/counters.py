"""Hardware counters of our kernels by Nsight Compute: what they execute, wait for and move.

    python -m benchmarks.gpu.counters --backend cuda --shape nat-256 --shape church-g5 --out counters.json

Each shape runs its gradient-penalty step once to warm up and once under ``ncu`` (clocks as they are, caches flushed
before each kernel). The JSON has one entry for each launch: shape, kernel, grid and the metrics of ``KEPT``. Without
permission to read counters, or without ncu, the status is 1 and the reason is printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import ours
from benchmarks.problem import STEPS, make_inputs
from benchmarks.shapes import SHAPES

from .processes import ROOT

# Of Nsight Compute: which names of KEPT it knows depends on its version, so whole sections are asked for as well.
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats",
    "Occupancy", "LaunchStats",
)  # fmt: skip
_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "gmma", "lg_throttle", "long_scoreboard", "math_pipe_throttle",
    "mio_throttle", "no_instruction", "not_selected", "short_scoreboard", "wait",
)  # fmt: skip
KEPT = {
    "nanoseconds": "gpu__time_duration.sum",
    "cycles": "smsp__cycles_active.avg",
    "instructions": "smsp__inst_executed.sum",
    "instructions_per_clock": "sm__inst_issued.avg.per_cycle_active",
    "warps": "sm__warps_active.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block_dynamic",
    "blocks_by_registers": "launch__occupancy_limit_registers",
    "blocks_by_shared_memory": "launch__occupancy_limit_shared_mem",
    **{
        f"pipe_{pipe}": f"smsp__inst_executed_pipe_{pipe}.sum"
        for pipe in ("alu", "fma", "fmaheavy", "xu", "tensor", "lsu")
    },
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "dram_bytes": "dram__bytes.sum",
    **{f"stalled_{reason}": _STALL.format(reason) for reason in STALLS},
}
"""What is asked for and written of each launch; stalls are warps per issued instruction."""

KERNELS = {
    "cuda": "regex:Forward|Backward|reduce_tables",
    "triton": "regex:forward_kernel|backward_.*_kernel|double_.*_kernel|row_terms_kernel|table_.*_kernel",
}


def step_under_profiler(backend: str, name: str) -> None:
    """The double-backward step of a shape: to warm up, then inside the profiled range."""
    device, dtype, shape = torch.device("cuda"), torch.bfloat16, SHAPES[name]
    attend, inputs = ours(backend)(shape, device, dtype), make_inputs(shape, dtype, device)
    STEPS["double"](attend, inputs)
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_push(f"shape={name}")
    torch.cuda.cudart().cudaProfilerStart()
    STEPS["double"](attend, inputs)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    torch.cuda.nvtx.range_pop()


def profile(backend: str, shapes: list[str], log: Path) -> str:
    """Run a child under ncu, which writes a CSV into ``log``; returns what went wrong, or nothing."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return "ncu is not on the path"
    child = [sys.executable, "-m", "benchmarks.gpu.counters", "--child", "--backend", backend]
    child += [word for name in shapes for word in ("--shape", name)]
    wanted = [["--metrics", ",".join(KEPT.values())], []]  # without, if one of them is unknown
    for metrics in wanted:
        command = [
            ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log), "--clock-control", "none",
            "--profile-from-start", "off", "--nvtx", "--kernel-name-base", "demangled", "-k", KERNELS[backend],
            *(word for name in SECTIONS for word in ("--section", name)), *metrics, *child,
        ]  # fmt: skip
        ended = subprocess.run(command, cwd=ROOT, check=False)
        if ended.returncode == 0 and log.exists() and '"ID"' in log.read_text(errors="replace"):
            return ""
    return f"ncu ended with status {ended.returncode}: {log.read_text(errors='replace')[-600:] if log.exists() else ''}"


def rows_of(log: Path) -> list[dict[str, Any]]:
    """One row for each launch: shape, kernel, and the metrics of ``KEPT`` by their short names."""
    lines = log.read_text(errors="replace").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    reader = csv.DictReader(lines[first:])
    next(reader)  # units
    rows, shape = [], ""
    for line in reader:
        # The backward passes launch from a thread of autograd's, outside of the range that names the shape.
        named = re.search(r"shape=([\w-]+)", " ".join(filter(None, line.values())))
        shape = named[1] if named else shape
        row: dict[str, Any] = {"shape": shape, "kernel": line["Kernel Name"], "grid": line["Grid Size"]}
        rows.append(row | {name: _number(line[metric]) for name, metric in KEPT.items() if line.get(metric)})
    return rows


def _number(text: str) -> float | str:
    try:
        return float(f"{float(text.replace(',', '')):.5g}")
    except ValueError:
        return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", required=True, choices=KERNELS)
    parser.add_argument("--shape", action="append", required=True, choices=SHAPES, metavar="NAME", help="repeatable")
    parser.add_argument("--out", type=Path, help="the JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        for name in options.shape:
            step_under_profiler(options.backend, name)
        return 0
    if options.out is None:
        parser.error("--out is needed")
    log = options.out.with_suffix(".csv")
    wrong = profile(options.backend, options.shape, log)
    if wrong:
        print(wrong)
        return 1
    rows = rows_of(log)
    options.out.write_text(json.dumps({"backend": options.backend, "dtype": "bfloat16", "launches": rows}, indent=1))
    print(f"{len(rows)} launches: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
