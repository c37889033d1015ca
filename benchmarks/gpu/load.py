"""Child: loads the compiled libraries, launches each backend once, and writes down what machine this is, as JSON.

gpu_check runs it with CUDA_DISABLE_PTX_JIT=1, under which a library without code for this GPU is an error instead of a
compilation that takes minutes.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch

import natten_ext
from benchmarks.environment import describe_environment
from benchmarks.runner import one_line
from benchmarks.tools import nvidia_smi, output_of

FIELDS = {"driver": "driver_version", "memory": "memory.total", "max_clock": "clocks.max.sm", "clock": "clocks.sm",
          "power_limit": "power.limit", "temperature": "temperature.gpu"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), torch.bfloat16
    environment = describe_environment(device, dtype)
    environment |= zip(FIELDS, nvidia_smi(*FIELDS.values()), strict=False)
    for tool in ("nvcc", "compute-sanitizer", "ncu"):
        if versions := re.findall(r"(?:release|[Vv]ersion) ?([\d.]+)", output_of(tool, "--version")):
            environment[tool] = versions[-1]
    if device.type == "cuda":
        environment["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    launched = {}
    for status in natten_ext.list_backends(device, dtype):
        if status.name != "reference" and status.available:
            try:
                query = torch.randn(1, 12, 12, 1, 32, device=device, dtype=dtype)
                output = natten_ext.neighborhood_attention(query, query, query, 3, 1, backend=status.name)
                launched[status.name] = "" if bool(output.isfinite().all()) else "its output is not finite"
            except Exception as error:  # whatever it is, it is reported
                launched[status.name] = one_line(error)
    options.out.write_text(json.dumps({"environment": environment, "launched": launched}))


if __name__ == "__main__":
    main()
