"""Forks while other threads are in attention: the children run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Threads that call attention while the main thread forks children that call it too.
FORKS = """
import os, threading
import torch, natten_ext

torch.set_num_threads(1)
x = torch.randn(1, 8, 8, 2, 8)
attend = lambda: natten_ext.neighborhood_attention(x, x, x, 3, backend="cpu")
expected = attend()
stop = threading.Event()

def loop():
    while not stop.is_set():
        attend()

threads = [threading.Thread(target=loop) for _ in range(2)]
[thread.start() for thread in threads]
for _ in range(50):
    child = os.fork()
    if child == 0:
        import signal
        signal.alarm(20)
        os._exit(0 if torch.equal(attend(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
[thread.join() for thread in threads]
"""


@pytest.mark.slow
def test_children_of_a_process_whose_threads_attend():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_lock_of_working_memory_is_free_in_children(tmp_path):
    """The threads do nothing else, so that most forks would find the lock taken."""
    program = tmp_path / "forks"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-std=c++20", "-O2", "-pthread", HERE / "forks.cpp", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "0 of 400\n"
