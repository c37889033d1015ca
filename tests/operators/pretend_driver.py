"""Launch Triton's kernels on a driver that only pretends, and check what it is given. Run as a script, without a GPU.

Everything from ``natten_ext.backends.triton`` to the call of ``cuLaunchKernelEx`` is real: Triton's compiler for sm_90,
the launcher that it makes of C, its check of pointers. So a kernel that takes other parameters than it is given, or in
another order, is seen, as is a grid or a size of shared memory that is not what was compiled for. A plan's first launch
goes through Triton, with tensors, and the others go to the compiled kernel, with addresses: both must give the same.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.kernels import pretended
from natten_ext.backends.triton import plans
from natten_ext.checks import windows_of
from natten_ext.geometry import Full
from natten_ext.orders import BACKWARD, DOUBLE_BACKWARD, FORWARD


def leaves(types: Any, value: Any) -> Iterator[Any]:
    """What of an argument is a kernel's parameter: all that Triton did not compile in."""
    if isinstance(types, tuple | list):
        for part, inner in zip(types, value, strict=True):
            yield from leaves(part, inner)
    elif types != "constexpr":
        yield value.data_ptr() if isinstance(value, torch.Tensor) else value


def sizes_of(ptx: str) -> list[int]:
    """Bytes of a kernel's parameters, in order."""
    head = ptx[ptx.index(".entry") :].split(")\n")[0]
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[usbf](\d+)", head)]


class Checked:
    """In the place of ``Plan._launch``: launches every step in both ways, and compares what the driver got to what the
    kernel takes."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.driver = driver
        self.count = ctypes.c_int.in_dll(driver, "pretend_count")
        self.launched: list[str] = []

    def __call__(self, plan: plans.Plan, tensors: list, addresses: list[int], ready: bool) -> None:
        assert ready
        for step in plan.steps:
            plan._compile_and_launch(step, tensors)  # compiles: how many parameters there are is not known before
            compiled = step.compiled
            sizes = sizes_of(compiled.asm["ptx"])
            wanted = [
                leaf
                for name, argument in zip(step.kernel.arg_names, step.typed(plan.all_tensors(tensors)), strict=True)
                for leaf in leaves(compiled.src.signature[name], argument)
            ]
            wanted += [0] * 2  # Triton's scratch memory: none
            ways = (
                lambda step=step: plan._compile_and_launch(step, tensors),
                lambda step=step: step.launch(addresses, 0, False),
                lambda step=step: step.launch(addresses, 0, True),
            )
            for way in ways:
                given = self.given(way, sizes)
                name = step.kernel.fn.__name__
                assert given == wanted, f"{name} takes {given}, is given {wanted}"
                config = list((ctypes.c_uint * 7).in_dll(self.driver, "pretend_config"))
                threads = 32 * step.options["num_warps"]
                assert config == [step.programs, 1, 1, threads, 1, 1, compiled.metadata.shared], (name, config)
            self.launched.append(name)

    def given(self, way: Any, sizes: list[int]) -> list[int]:
        """The parameters that the driver gets."""
        (ctypes.c_int * len(sizes)).in_dll(self.driver, "pretend_sizes")[:] = sizes
        self.count.value = len(sizes)
        way()
        self.count.value = 0
        raw = bytes((ctypes.c_ubyte * (8 * len(sizes))).in_dll(self.driver, "pretend_values"))
        return [int.from_bytes(raw[8 * i : 8 * i + size], "little", signed=True) for i, size in enumerate(sizes)]


def attend(neighborhood: Any, shape: tuple[int, ...], table: tuple[int, ...] | None, score: str) -> None:
    """All orders: with all cotangents, and with some (the kernels then have fewer parameters)."""
    key, value, grad = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(3))
    query = torch.randn(*shape[:-1], 3 * shape[-1] + 1, dtype=torch.bfloat16)[..., 1 : shape[-1] + 1]
    bias = None if table is None else torch.randn(table)
    inputs = query, key, value, bias
    choices = neighborhood.encode(), score == "l2", 0.3
    needs = [True, True, True, bias is not None]
    output, lse, natural_lse = plans.run(FORWARD, (*inputs, *choices, True))
    rest = grad, natural_lse, *inputs, output, lse, *choices
    plans.run(BACKWARD, (*rest, needs))
    plans.run(DOUBLE_BACKWARD, (*inputs, *rest, [True, False, *needs]))
    plans.run(DOUBLE_BACKWARD, (query, None, value, None, *rest, [True, False, False, True, False, False]))


def main() -> None:
    with pretended.gpu("sm_90") as driver:
        checked = Checked(driver)
        plans.Plan._launch = lambda *arguments: checked(*arguments)
        attend(Full(), (2, 65, 2, 24), None, "l2")
        attend(windows_of(2, 2, [3, (5, 2)], [1, (2, 3)]), (2, 11, 13, 2, 4), (2, 9, 5), "dot")
        video = windows_of(3, 2, [3, (2, 3, 5)], 1, [(2, 1, 1), (1, 2, 3)], (True, False, False))
        attend(video, (2, 5, 6, 7, 2, 16), (2, 5, 5, 9), "dot")
    print(len(checked.launched), *sorted(set(checked.launched)))


if __name__ == "__main__":
    main()
