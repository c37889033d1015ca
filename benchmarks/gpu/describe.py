"""Child: what runs here. One event with the environment, and which backends can run which precision, and why not."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import natten_ext
from benchmarks.environment import describe_environment
from benchmarks.precision import PRECISIONS

from .child import EventLog


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--stem", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device(options.device)
    environment = describe_environment(device, torch.float32)
    if device.type == "cuda":
        torch.ones(1, device=device).sum().item()  # a driver that is too old shows here
        environment["cudnn"] = torch.backends.cudnn.version()
        environment["devices"] = torch.cuda.device_count()
        environment["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    backends = {
        name: {
            status.name: status.reason
            for status in natten_ext.list_backends(device, dtype)
            if status.name != "reference" and not (name == "tf32" and device.type == "cpu")
        }
        for name, dtype in PRECISIONS.items()
    }
    EventLog(options.stem).write(environment=environment, backends=backends, finished=True)


if __name__ == "__main__":
    main()
