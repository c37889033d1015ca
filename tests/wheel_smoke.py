"""What an installed natten_ext must do, run by a Python that has it and torch, and nothing else of this repository.

    python -I tests/wheel_smoke.py

Prints where the package is and how long the first gradient took, and fails where a result is wrong.
"""

import sys
import time

start = time.perf_counter()

import torch  # noqa: E402

compiler_before = "torch._dynamo" in sys.modules

import natten_ext  # noqa: E402

assert ("torch._dynamo" in sys.modules) == compiler_before, "torch's compiler takes two seconds to import"

q, k, v = (torch.randn(1, 6, 6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
table = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
results = []
for backend in ("cpu", "reference"):
    out = natten_ext.neighborhood_attention(q, k, v, 3, [1, 2], bias=table, backend=backend)
    first = torch.autograd.grad(out.sin().sum(), (q, k, v, table), create_graph=True)
    if not results:
        seconds = time.perf_counter() - start
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v, table))
    results.append((out, *first, *second))
torch.testing.assert_close(*results)
print(f"first gradient after {seconds:.1f} s, with the imports")
print(natten_ext.__file__)
