"""Launch Triton's kernels on a driver that only pretends, and check what it is given. Run as a script, without a GPU.

Everything from ``natten_ext.backends.triton`` to the call of ``cuLaunchKernelEx`` is real: Triton's compiler for sm_90,
the launcher that it makes of C, its check of pointers. So a kernel that takes other parameters than it is given, or in
another order, is seen, as is a grid or a size of shared memory that is not what was compiled for.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher

from benchmarks.kernels import triton_resources as resources
from natten_ext.backends.triton import backward, configs, double_backward, forward
from natten_ext.backends.triton.launch import recorded_launches
from natten_ext.checks import windows_of
from natten_ext.geometry import Full, Grid
from natten_ext.orders import BACKWARD, DOUBLE_BACKWARD, FORWARD


def load(folder: Path) -> ctypes.CDLL:
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("pretend_cuda.c")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", f"-Wl,-soname,{library.name}", "-o", library, source],
        check=True,
    )
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)  # where Triton links its launchers
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def pretend(arch: str) -> None:
    """Make Triton's driver one with a device of this architecture."""
    driver = resources._CompileOnly(arch)
    driver.launcher_cls = CudaLauncher
    driver.get_current_device = lambda: 0
    driver.utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": resources.SHARED_LIMIT[arch]},
        load_binary=lambda *binary: (1, 1, 0, 0, 1024),  # module, function, registers, spills, most threads
    )
    triton.runtime.driver.set_active(driver)


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


def launch(pretended: ctypes.CDLL, kernel: Any, programs: int, arguments: tuple, options: dict) -> None:
    """Launch a kernel twice, and compare what the second launch got to what the kernel takes."""
    count = ctypes.c_int.in_dll(pretended, "pretend_count")
    count.value = 0
    compiled = kernel[(programs,)](*arguments, **options)
    sizes = sizes_of(compiled.asm["ptx"])
    (ctypes.c_int * len(sizes)).in_dll(pretended, "pretend_sizes")[:] = sizes
    count.value = len(sizes)
    kernel[(programs,)](*arguments, **options)  # from Triton's cache, which has a path of its own

    raw = bytes((ctypes.c_ubyte * (8 * len(sizes))).in_dll(pretended, "pretend_values"))
    given = [int.from_bytes(raw[8 * i : 8 * i + size], "little", signed=True) for i, size in enumerate(sizes)]
    by_name = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    wanted = [leaf for name in kernel.arg_names for leaf in leaves(compiled.src.signature[name], by_name[name])]
    wanted += [0] * 2  # Triton's scratch memory: none
    name = kernel.fn.__name__
    assert given == wanted, f"{name} takes {given}, is given {wanted}"
    config = list((ctypes.c_uint * 7).in_dll(pretended, "pretend_config"))
    assert config == [programs, 1, 1, 32 * options["num_warps"], 1, 1, compiled.metadata.shared], (name, config)


def attend(neighborhood: Any, shape: tuple[int, ...], table: tuple[int, ...] | None, score: str) -> None:
    """All orders: with all cotangents, and with some (the kernels then have fewer parameters)."""
    key, value, grad = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(3))
    query = torch.randn(*shape[:-1], 3 * shape[-1] + 1, dtype=torch.bfloat16)[..., 1 : shape[-1] + 1]
    bias = None if table is None else torch.randn(table)
    inputs = query, key, value, bias
    choices = neighborhood.encode(), score == "l2", 0.3
    needs = [True, True, True, bias is not None]
    output, lse, _ = forward.forward(FORWARD.operands(*inputs, *choices, False))
    rest = grad, None, *inputs, output, lse, *choices
    backward.backward(BACKWARD.operands(*rest, needs))
    double_backward.double_backward(DOUBLE_BACKWARD.operands(*inputs, *rest, [True, False, *needs]))
    some = DOUBLE_BACKWARD.operands(query, None, value, None, *rest, [True, False, False, True, False, False])
    double_backward.double_backward(some)


def main(folder: Path) -> None:
    pretended = load(folder)
    pretend("sm_90")
    launched = []

    def record(kernel: Any, programs: int, arguments: tuple, options: dict) -> None:
        launch(pretended, kernel, programs, arguments, options)
        launched.append(kernel.fn.__name__)

    with recorded_launches(record), configs.assumed_architecture("sm_90"):
        attend(Full(), (2, 65, 2, 24), None, "l2")
        attend(windows_of(2, 2, [3, (5, 2)], [1, (2, 3)]), (2, 11, 13, 2, 4), (2, 9, 5), "dot")
        attend(Grid((4, 4)), (2, 8, 12, 2, 24), (2, 7, 7), "dot")
        video = windows_of(3, 2, [3, (2, 3, 5)], 1, [(2, 1, 1), (1, 2, 3)], (True, False, False))
        attend(video, (2, 5, 6, 7, 2, 16), (2, 5, 5, 9), "dot")
    print(len(launched), *sorted(set(launched)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
