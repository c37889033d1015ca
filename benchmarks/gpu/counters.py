"""Hardware counters of our kernels by Nsight Compute: what they execute, wait for and move.

    python -m benchmarks.gpu.counters --backend cuda --shape nat-256 --shape church-g5 --out counters.json

Each shape runs its gradient-penalty step once to warm up and once under ``ncu`` (clocks as they are, caches flushed
before each kernel). The JSON has one entry for each launch: shape, kernel, grid and every metric. Without
permission to read counters, or without ncu, the status is 1 and the reason is printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.candidates import ours
from benchmarks.problem import STEPS, make_inputs
from benchmarks.shapes import SHAPES

from .child import ROOT

# Of Nsight Compute: which names it knows depends on its version, so whole sections stand beside those that must be.
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats",
    "Occupancy", "LaunchStats",
)  # fmt: skip
METRICS = (
    "smsp__inst_executed.sum", "smsp__issue_active.avg.pct_of_peak_sustained_active", "smsp__cycles_active.avg",
    "smsp__inst_executed_pipe_alu.sum", "smsp__inst_executed_pipe_fma.sum", "smsp__inst_executed_pipe_fmaheavy.sum",
    "smsp__inst_executed_pipe_xu.sum", "smsp__inst_executed_pipe_tensor.sum", "smsp__inst_executed_pipe_lsu.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", "lts__t_bytes.sum", "dram__bytes.sum", "gpu__time_duration.sum",
)  # fmt: skip
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
    wanted = [["--metrics", ",".join(METRICS)], []]  # without, if one of them is unknown
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


def rows_of(log: Path) -> list[dict[str, str | float]]:
    """One row for each launch, from ncu's CSV: names and numbers as they are, empty columns left out."""
    lines = log.read_text(errors="replace").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    reader = csv.DictReader(lines[first:])
    units = next(reader)
    rows = []
    for line in reader:
        if not (line["ID"] or "").isdigit():
            continue
        row: dict[str, str | float] = {}
        for name, value in line.items():
            if name and value:
                number = value.replace(",", "")
                label = f"{name} [{units[name]}]" if units.get(name) else name
                row[label] = float(number) if number.replace(".", "", 1).replace("e+", "", 1).isdigit() else value
        rows.append(row)
    return rows


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
