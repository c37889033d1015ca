"""Code written for NATTEN runs unmodified on this package, forward and backward, and gives what the oracle gives."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from natten_ext import compat
from natten_ext.compat import natten_014, natten_017, natten_021
from tests.ecosystem import natten_oracle as oracle
from tests.ecosystem.natten_clients import Block, Causal3d, HydraAttention, NatAttention

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed() -> Iterator[Callable[..., ModuleType]]:
    """A function that installs and imports natten, until the test ends."""

    def import_natten(**options: str) -> ModuleType:
        compat.install(**options)
        return importlib.import_module("natten")

    yield import_natten
    compat.uninstall()


# ---------------------------------------------------------------------------------------------- what can be imported


def test_natten_is_found(installed):
    assert "natten" not in sys.modules
    natten = installed()
    assert importlib.util.find_spec("natten").name == "natten"
    assert importlib.util.find_spec("natten.functional").origin == "natten_ext.compat"
    assert importlib.metadata.version("natten") == natten.__version__ == "0.17.5"
    assert "natten" in {found.name for found in importlib.metadata.distributions()}
    from natten.functional import na2d_av, na2d_qk, natten2dqkrpb

    assert (na2d_av, na2d_qk, natten2dqkrpb) == (compat.na2d_av, compat.na2d_qk, compat.natten2dqkrpb)
    compat.uninstall()
    compat.uninstall()
    assert "natten" not in sys.modules and "natten.functional" not in sys.modules
    with pytest.raises(ImportError):
        importlib.import_module("natten")


@pytest.mark.parametrize(
    ("version", "functions", "modules"),
    [
        ("0.14.6", natten_017, natten_014),
        ("0.17.5+torch260cu124", natten_017, natten_017),
        ("0.21.7", natten_021, natten_021),
    ],
)
def test_versions(installed, version, functions, modules):
    installed(version="0.15.1")
    natten = installed(version=version)
    assert natten.__version__ == importlib.metadata.version("natten") == version
    for axes in (1, 2, 3):
        name = f"NeighborhoodAttention{axes}D"
        assert getattr(natten, name) is getattr(modules, name)
        assert getattr(natten.functional, f"na{axes}d") is getattr(functions, f"na{axes}d")
        if functions is natten_017:
            for prefix in ("na", "natten"):
                assert getattr(importlib.import_module(f"natten.{prefix}{axes}d"), name) is getattr(modules, name)
        assert getattr(natten, f"na{axes}d") is getattr(functions, f"na{axes}d")
    arguments = (2, 3, 1, 2, (True, False)) if functions is natten_021 else (2, 3, 2, (True, False))
    assert natten.utils.check_all_args(*arguments)[-2:] == ((2, 2), (True, False))


NAMES = {
    "natten": [
        "HAS_LIBNATTEN", "are_deterministic_algorithms_enabled", "attention", "disable_autotuner",
        "disable_gemm_na", "disable_tf32", "disable_tiled_na", "enable_fused_na", "enable_gemm_na",
        "enable_tf32", "enable_tiled_na", "get_memory_usage_preference", "has_bfloat", "has_cuda", "has_fna",
        "has_fp32_gemm", "has_fp64_gemm", "has_fused_na", "has_gemm", "has_half", "has_tf32_gemm",
        "is_autotuner_enabled", "is_autotuner_enabled_for_backward", "is_autotuner_enabled_for_forward",
        "is_autotuner_thorough_for_backward", "is_autotuner_thorough_for_forward", "is_flex_compile_allowed",
        "is_fna_enabled", "is_fused_na_enabled", "is_gemm_na_enabled", "is_kv_parallelism_in_fused_na_enabled",
        "is_memory_usage_default", "is_memory_usage_strict", "is_memory_usage_unrestricted",
        "is_tf32_in_gemm_na_enabled", "is_tiled_na_enabled", "merge_attentions", "set_memory_usage_preference",
        "use_autotuner", "use_deterministic_algorithms", "use_fna", "use_fused_na", "use_gemm_na",
        "use_kv_parallelism_in_fused_na", "use_tf32_in_gemm_na", "use_tiled_na",
    ],
    "natten.functional": [
        "NATTEN2DAVFunction", "NATTEN2DQKRPBFunction", "na1d_av", "na1d_qk", "na1d_qk_with_bias", "na2d_av",
        "na2d_qk", "na3d_av", "na3d_qk", "na3d_qk_with_bias", "natten1dav", "natten1dqk", "natten1dqkrpb",
        "natten2dav", "natten2dqk", "natten2dqkrpb", "natten3dav", "natten3dqk", "natten3dqkrpb",
        "neighborhood_attention_generic",
    ],
    "natten.context": ["is_fna_enabled", "set_memory_usage_preference", "use_kv_parallelism_in_fused_na"],
    "natten.flops": ["add_natten_handle", "av_1d_flop", "av_2d_flop", "get_flops", "qk_2d_rpb_flop"],
    "natten.modules": ["NeighborhoodAttention2D"],
    "natten.types": ["CausalArg2DTypeOrDed", "Dimension3DType", "DimensionType", "CausalArgTypeOrDed"],
    "natten.utils": ["check_all_args", "get_num_na_weights", "log"],
    "natten.utils.checks": ["check_all_args"],
    "natten.utils.log": ["get_logger"],
}  # fmt: skip


@pytest.mark.parametrize("version", ["0.14.6", "0.17.5", "0.21.7"])
def test_names_that_clients_import(installed, version):
    installed(version=version)
    for module, names in NAMES.items():
        for name in names if (module, version) != ("natten.context", "0.14.6") else []:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_switches_are_remembered(installed):
    natten = installed()
    assert not natten.is_fna_enabled() and not natten.is_fused_na_enabled()
    natten.use_fused_na()
    assert natten.is_fna_enabled() and natten.context.is_fna_enabled()
    natten.use_fused_na(False)
    assert not natten.is_fused_na_enabled()
    natten.use_autotuner(forward_pass=True, backward_pass=True, thorough_mode_forward=False)
    assert not natten.is_autotuner_enabled()
    natten.set_memory_usage_preference("unrestricted")
    assert natten.is_memory_usage_unrestricted() and not natten.is_memory_usage_default()
    natten.set_memory_usage_preference()
    assert natten.has_cuda() == natten.has_half(0) == torch.cuda.is_available()


def test_it_goes_before_an_installed_one(installed, tmp_path, monkeypatch):
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("__version__ = '0.20.0'")
    (tmp_path / "natten-0.20.0.dist-info").mkdir()
    (tmp_path / "natten-0.20.0.dist-info" / "METADATA").write_text("Name: natten\nVersion: 0.20.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert importlib.metadata.version("natten") == "0.20.0"
    assert installed().__version__ == importlib.metadata.version("natten") == "0.17.5"
    compat.uninstall()
    assert importlib.metadata.version("natten") == importlib.import_module("natten").__version__ == "0.20.0"
    del sys.modules["natten"]


def test_another_natten_stays(installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", ModuleType("natten"))
    with pytest.raises(RuntimeError, match="natten is imported already: call"):
        compat.install()
    assert "natten" in sys.modules


@pytest.mark.parametrize(("version", "exception"), [(17, TypeError), ("latest", ValueError), ("0", ValueError)])
def test_bad_versions(version, exception):
    with pytest.raises(exception, match=f"version must be .* got {version!r}"):
        compat.install(version=version)


# ---------------------------------------------------------------------------------------------- clients


def same(network: nn.Module, expected: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """The same output and gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    leaves = [x, *network.parameters()]
    outputs = [function(x) for function in (network, expected)]
    cotangent = torch.randn_like(outputs[0])
    results = [[output, *torch.autograd.grad(output, leaves, cotangent)] for output in outputs]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def with_oracle(network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network with the oracle's functions, which has the same parameters."""

    def call(x: torch.Tensor) -> torch.Tensor:
        functions = network.qk, network.av
        network.qk, network.av = oracle.natten2dqkrpb, oracle.natten2dav
        try:
            return network(x)
        finally:
            network.qk, network.av = functions

    return call


@pytest.mark.parametrize("extents", [(9, 11), (4, 7)], ids=["map", "padded map"])
def test_attention_of_nat_and_dinat(installed, extents):
    functional = installed().functional
    network = NatAttention(8, 3, 2, functional.natten2dqkrpb, functional.natten2dav, dilation=2).double()
    same(network, with_oracle(network), torch.randn(2, *extents, 8).double())


@pytest.mark.parametrize("older", [False, True], ids=["functions", "autograd functions"])
def test_attention_of_stylenat(installed, older):
    functional = installed().functional
    functions = functional.natten2dqkrpb, functional.natten2dav
    if older:
        functions = functional.NATTEN2DQKRPBFunction.apply, functional.NATTEN2DAVFunction.apply
    network = HydraAttention(16, 4, [3, 5], [4, 1], *functions).double()
    same(network, with_oracle(network), torch.randn(2, 12, 13, 16).double())


@pytest.mark.parametrize("version", ["0.14.6", "0.17.5"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_blocks_with_modules(installed, axes, version):
    """Of NAT's successors, on sounds, images and volumes."""
    kernel = (3, 5, 3)[:axes] if version == "0.17.5" else 3
    block = Block(installed(version=version), axes, 8, 2, kernel, dilation=None).double()
    kernels = kernel if isinstance(kernel, tuple) else (kernel,) * axes

    def expected(x: torch.Tensor) -> torch.Tensor:
        module = block.attn
        q, k, v = module.qkv(block.norm(x)).unflatten(-1, (3, 2, 4)).movedim(-3, 0).movedim(-2, 2)
        weights = oracle.qk(q / 2, k, kernels, (1,) * axes, module.rpb).softmax(-1)
        return x + module.proj(oracle.av(weights, v, kernels, (1,) * axes).movedim(1, -2).flatten(-2))

    same(block, expected, torch.randn(2, *(6, 5, 7)[:axes], 8).double())


@pytest.mark.parametrize("fused", [False, True])
def test_causal_video_model(installed, fused):
    natten = installed()
    natten.use_fused_na(fused)
    network = Causal3d(natten, 8, 2, (3, 3, 5)).double()
    sizes, causal = ((3, 3, 5), (1, 1, 1)), (True, False, False)

    def expected(x: torch.Tensor) -> torch.Tensor:
        q, k, v = network.qkv(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).movedim(-2, 2)
        weights = oracle.qk(q / 2, k, *sizes, causal=causal).softmax(-1)
        return oracle.av(weights, v, *sizes, causal=causal).movedim(1, -2).flatten(-2)

    same(network, expected, torch.randn(1, 5, 4, 6, 8).double())


def test_flops_as_fvcore_counts_them(installed):
    """Two products: prod(kernel) multiply-adds for each entry of a map."""
    pytest.importorskip("fvcore")
    natten = installed()
    x, modules = torch.randn(2, 6, 7, 8), natten.NeighborhoodAttention2D
    linear = x.numel() * 8 * 4
    for module in (modules(8, 2, 3), modules(8, 2, 3, attn_drop=0.5)):
        assert natten.flops.get_flops(module.train(), x, disable_warnings=True) == linear + 2 * 9 * x.numel()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dinat", "nat"])
def test_transformers(model):
    """Hugging Face's: logits, feature maps and all gradients, with natten as it finds it, and with the oracle."""
    transformers = pytest.importorskip("transformers")
    if tuple(map(int, transformers.__version__.split(".")[:2])) > (4, 53):
        pytest.skip("its DiNAT after 4.53 is not right with any NATTEN")
    command = [sys.executable, "-m", "tests.ecosystem.transformers_models", model]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
