"""The process that measures memory on a CPU, and the client that talks to it (one JSON line per question)."""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .candidates import all_candidates
from .environment import limit_memory
from .memory import WORKER_ENVIRONMENT, Memory, ResidentSet, measure
from .problem import STEPS, CannotError, make_inputs
from .shapes import Shape

ROOT = Path(__file__).resolve().parent.parent


class MemoryWorker:
    """Starts the subprocess at the first question, and again if it died. Use as a context manager."""

    def __init__(self, threads: int, timeout: float = 300.0) -> None:
        self.threads = threads
        self.timeout = timeout
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[tuple, Memory | CannotError] = {}

    def __enter__(self) -> MemoryWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def measure(self, candidate: str, shape: Shape, dtype: torch.dtype, order: str) -> Memory:
        """Raises CannotError where the candidate fails, the process dies, or the answer takes too long."""
        known = self._known.get((candidate, shape, dtype, order))
        if isinstance(known, CannotError):
            raise known
        return known or self._ask(candidate, shape, dtype, order)

    def measure_ahead(self, questions: list[tuple[str, Shape, torch.dtype, str]]) -> None:
        """Answer these now, in two processes side by side, for when they are asked.

        For candidates that compile: a compiler is busy with one core for seconds, and what it made for one process lies
        in its cache for all others.
        """

        def answer(some: list[tuple[str, Shape, torch.dtype, str]]) -> None:
            with MemoryWorker(self.threads, self.timeout) as worker:
                for question in some:
                    try:
                        self._known[question] = worker.measure(*question)
                    except CannotError as error:
                        self._known[question] = error

        with ThreadPoolExecutor() as pool:
            list(pool.map(answer, filter(None, (questions[::2], questions[1::2]))))

    def _ask(self, candidate: str, shape: Shape, dtype: torch.dtype, order: str) -> Memory:
        question = {
            "candidate": candidate,
            "shape": shape.to_dict(),
            "dtype": str(dtype).removeprefix("torch."),
            "order": order,
        }
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        timer = threading.Timer(self.timeout, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise CannotError(f"the memory measurement died (exit status {process.wait()})")
        answer = json.loads(line)
        if "cannot" in answer:
            raise CannotError(answer["cannot"])
        return Memory(**answer)

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.memory_worker", str(self.threads)],
            cwd=ROOT,
            env={**os.environ, **WORKER_ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def _stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Measure one candidate on one shape and order."""
    gc.collect()
    gc.freeze()  # libraries' objects, of which a compiler brings more later: the measurement collects garbage often
    device, dtype = torch.device("cpu"), getattr(torch, question["dtype"])
    shape = Shape.from_dict(question["shape"])
    name, order = question["candidate"], question["order"]
    candidate = next(c for c in all_candidates(device.type) if c.name == name)
    inputs = make_inputs(shape, dtype, device)
    if candidate.drops_table:
        inputs = inputs.without_table()
    attend = candidate.prepare(shape, device, dtype)
    if candidate.compiles:  # the compiler must not count, so the warm-up is on the shape itself
        STEPS[order](attend, inputs)
        warm_up = None
    else:
        tiny = shape.tiny()
        tiny_inputs = make_inputs(tiny, dtype, device)
        warm_up = functools.partial(STEPS[order], candidate.prepare(tiny, device, dtype), tiny_inputs)
    memory = measure(attend, inputs, order, ResidentSet(), warm_up)
    return {"beyond": memory.beyond, "returned": memory.returned, "step": memory.step}


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    limit_memory()
    # Libraries may print; only answers may go to the pipe.
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except CannotError as error:
            reply = {"cannot": str(error)}
        except Exception as error:  # any library may raise anything: the client reports it
            reply = {"cannot": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
