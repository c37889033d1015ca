"""torch.library's own checks, fake tensors, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import natten_ext
from natten_ext.backends import choice, cuda
from natten_ext.backends.support import asked_once, constant_when_compiled
from natten_ext.checks import windows_of
from natten_ext.geometry import Full, Grid
from natten_ext.operators import OPERATORS
from tests.operators.cases import Inputs, find, forward, grad_output_of, inputs_of

OPCHECK_CASES = [
    (find("full-self-9"), Full()),
    (find("full-cross-13x29", score="l2"), Full()),
    (find("grid-6x10-w3x5", bias=True), Grid((3, 5))),
    (find("na-7x9-k3", score="l2", bias=True, shape=(1, 4, 5, 1, 5)), windows_of(2, 1, 3, 1)),
]

COMPILED = [
    find("full-self-9"),
    find("full-self-9", score="l2", tied=("key",)),
    find("full-cross-13x29"),
    find("grid-6x10-w3x5", score="l2", bias=True),
    find("na-7x9-k3", bias=True),
    find("na-11x9-per-head", score="l2", bias=True),
    find("na-shared-9x11-k3", bias=True),
]


def operator_arguments(case, neighborhood, target, dtype=torch.float32) -> tuple:
    inputs = inputs_of(case, dtype, target.device)
    tensors = [inputs["query"], inputs["key"], inputs["value"], inputs.get("bias")]
    return tensors, (neighborhood.encode(), case.score == "l2", case.effective_scale)


@pytest.mark.samples(interpreted=0)
@pytest.mark.parametrize("problem", OPCHECK_CASES, ids=lambda problem: str(problem[0]))
def test_opcheck(target, problem):
    """Schema, fake implementation and autograd registration of the three operators."""
    case, neighborhood = problem
    target.skip_unless_can(torch.float32, case.head_dim)
    tensors, choices = operator_arguments(case, neighborhood, target)
    ops = OPERATORS[target.backend]

    def leaves(tensors) -> list:
        return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]

    torch.library.opcheck(ops.forward.default, (*leaves(tensors), *choices, False))

    output, lse, _ = ops.forward(*tensors, *choices, False)
    (grad_output,) = leaves([torch.randn_like(output)])
    needs = [True, True, True, tensors[3] is not None]
    backward = (grad_output, None, *leaves(tensors), output, lse, *choices, needs)
    torch.library.opcheck(ops.backward.default, backward)

    # The third derivative is an error by design, so nothing here requires grad.
    cotangents = [None if t is None else torch.randn_like(t) for t in tensors]
    for given in (cotangents, [cotangents[0], None, cotangents[2], None]):
        double = (*given, grad_output.detach(), None, *tensors, output, lse, *choices, [True, False, *needs])
        torch.library.opcheck(ops.double_backward.default, double)


@pytest.mark.samples(interpreted=4)
@pytest.mark.parametrize(
    "needs",
    [[True, False, False, False], [False, True, False, True], [False, False, True, False], [False] * 4],
    ids=str,
)
def test_opcheck_with_part_of_the_gradients(target, needs):
    case, neighborhood = OPCHECK_CASES[3]
    target.skip_unless_can(torch.float32, case.head_dim)
    tensors, choices = operator_arguments(case, neighborhood, target)
    ops = OPERATORS[target.backend]
    output, lse, _ = ops.forward(*tensors, *choices, False)
    arguments = (torch.randn_like(output), None, *tensors, output, lse, *choices)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.backward.default, (*arguments, needs), test_utils=utils)
    cotangents = [torch.randn_like(t) if need else None for t, need in zip(tensors, needs, strict=True)]
    for double_needs in ([False, False, *needs], [True, False, *needs]):
        double = (*cotangents, *arguments, double_needs)
        torch.library.opcheck(ops.double_backward.default, double, test_utils=utils)


@pytest.mark.cases(COMPILED)
@pytest.mark.parametrize("mode", ["fake", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_shapes_without_data(target, case, mode, dtype):
    target.skip_unless_can(dtype, case.head_dim)
    if mode == "meta" and target.device != "cpu":
        pytest.skip("one meta device is enough")

    def shapes(device: str) -> list[tuple]:
        leaves = {n: torch.empty(t.shape, dtype=t.dtype, device=device, requires_grad=True)
                  for n, t in inputs_of(case, dtype).items()}  # fmt: skip
        output = forward(case, leaves, target.backend)
        first = torch.autograd.grad(output.sum(), list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), list(leaves.values()))
        results = [output, *first, *second]
        return [(r.shape, r.dtype, r.device.type, r.stride()) for r in results]

    if mode == "fake":
        with FakeTensorMode():
            result = shapes(target.device)
        assert result == shapes(target.device)
    else:
        try:
            result = shapes("meta")
        except RuntimeError as error:
            assert "meta" in str(error)
        else:
            assert [r[:2] for r in result] == [r[:2] for r in shapes("cpu")]


def compiled_and_eager(case, target, dtype=torch.float32, **options) -> tuple[Inputs, Inputs]:
    torch._dynamo.reset()

    def attend(leaves: Inputs) -> torch.Tensor:
        return forward(case, leaves, target.backend)

    def solve(function) -> Inputs:
        leaves = {n: t.requires_grad_() for n, t in inputs_of(case, dtype, target.device).items()}
        output = function(leaves)
        grads = torch.autograd.grad(output, list(leaves.values()), grad_output_of(case, output.detach()))
        return {"output": output.detach()} | dict(zip(leaves, grads, strict=True))

    return solve(torch.compile(attend, fullgraph=True, **options)), solve(attend)


@pytest.mark.cases(COMPILED)
def test_compiled_equals_eager(any_target, case):
    """Forward and backward in one graph, through AOTAutograd (no code generator)."""
    compiled, eager = compiled_and_eager(case, any_target, backend="aot_eager")
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name])


@pytest.mark.slow
def test_compiled_by_inductor(target):
    """The real compiler, with work before and after the op for it to fuse."""
    if target.slow:
        pytest.skip("interpreted")
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = natten_ext.NeighborhoodAttention(16, 2, 3, [1, 2], backend=target.backend).to(target.device)
    x = torch.randn(2, 7, 6, 16, device=target.device)

    def gradients(function) -> list[torch.Tensor]:
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.nn.functional.gelu(function(leaf * 2)).square().mean().backward()
        return [leaf.grad, *(parameter.grad.clone() for parameter in module.parameters())]

    for compiled, eager in zip(gradients(torch.compile(module, fullgraph=True)), gradients(module), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", [3, [3, 5]], ids=str)
def test_any_number_of_heads_that_share_keys(kernels):
    """The compiler takes it for a symbol: from the start, or once it has changed."""
    torch._dynamo.reset()

    def attend(query, key):
        return natten_ext.neighborhood_attention(query, key, key, kernels, backend="cpu")

    for dynamic in (True, None):
        compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="eager")
        for heads, key_heads in ((2, 1), (4, 2), (12, 2)):
            query = torch.randn(1, 8, heads, 4)
            key = query[:, :, :key_heads]
            torch.testing.assert_close(compiled(query, key), attend(query, key))


@pytest.mark.samples(interpreted=0)
def test_dynamic_shapes(target):
    """One graph for maps of several sizes."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def attend(x: torch.Tensor) -> torch.Tensor:
        return natten_ext.neighborhood_attention(x, x, x, 3, 2, backend=target.backend).sin()

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    for height, width in ((6, 7), (8, 9), (11, 6)):
        x = torch.randn(2, height, width, 2, 8, device=target.device)
        torch.testing.assert_close(compiled(x), attend(x))
    assert len(graphs) == 1


def test_compiled_under_autocast_and_use_backend(any_target):
    torch._dynamo.reset()
    case = find("na-7x9-k3", bias=True)
    any_target.skip_unless_can(torch.bfloat16, case.head_dim)
    inputs = inputs_of(case, torch.float32, any_target.device)

    def attend(leaves: Inputs) -> torch.Tensor:
        return forward(case, leaves, None)

    with natten_ext.use_backend(any_target.backend), torch.autocast(any_target.device, dtype=torch.bfloat16):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(inputs)
        eager = attend(inputs)
    assert compiled.dtype == torch.bfloat16
    torch.testing.assert_close(compiled, eager)


def test_a_change_of_backend_is_seen_by_compiled_code(target):
    """`use_backend` is guarded on: no stale choice in the cache."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    x = torch.randn(1, 6, 2, 8, device=target.device)
    compiled = torch.compile(lambda x: natten_ext.attention(x, x, x), fullgraph=True, backend=count)
    for name in (target.backend, "reference", target.backend):
        with natten_ext.use_backend(name):
            compiled(x)
    assert len(graphs) == 2
    assert any("natten_ext" in node for node in graphs[0]) and not any("natten_ext" in node for node in graphs[1])


@pytest.mark.cases(COMPILED[:1])
def test_compiled_double_backward_raises_and_is_not_wrong(target, case):
    """PyTorch itself refuses second derivatives of compiled code; it must not answer with something else."""
    torch._dynamo.reset()
    leaves = {n: t.requires_grad_() for n, t in inputs_of(case, torch.float32, target.device).items()}
    function = torch.compile(
        lambda tensors: forward(case, tensors, target.backend), fullgraph=True, backend="aot_eager"
    )
    first = torch.autograd.grad(function(leaves).square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
        torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))


def test_answers_are_constant_to_the_compiler():
    """What is asked of drivers and files, which torch.compile cannot trace, is asked once."""
    asked = []

    @asked_once
    @torch.compiler.disable  # as for a driver: to trace this is an error
    def answer(number):
        asked.append(number)
        return number + 1

    torch._dynamo.reset()
    x = torch.ones(1)
    for _ in range(2):
        assert torch.compile(lambda x: x * answer(3) * answer(4), fullgraph=True, backend="eager")(x) == 20
        torch._dynamo.reset()
    assert asked == [3, 4]


def test_constants_are_those_of_torch():
    ours, torchs = lambda: 0, lambda: 0
    constant_when_compiled(ours)
    torch.compiler.assume_constant_result(torchs)
    assert vars(ours) == vars(torchs) != {}


def test_the_choice_on_a_gpu_compiles(monkeypatch):
    """With a driver's answers instead of a driver."""
    for module in choice.FUSED.values():
        if hasattr(module, "cannot_use_gpu"):
            monkeypatch.setattr(module, "cannot_use_gpu", lambda device: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "_warn_of_ptx", lambda device: None)
    monkeypatch.setattr(cuda, "_shared_limit", lambda device: 0)
    monkeypatch.setattr(cuda, "_most_channels", lambda dtype, limit: 256)
    torch._dynamo.reset()
    chosen = []

    def attend(x):
        chosen.append(choice.choose(None, torch.device("cuda"), x.dtype, x.shape[-1], "full", 256))
        return x + 1

    torch.compile(attend, fullgraph=True, backend="eager", dynamic=True)(torch.ones(2, 8))
    statuses = natten_ext.list_backends("cuda", head_dim=8, neighborhood="full")
    assert chosen == [next(status.name for status in statuses if status.available)]


def test_the_warning_of_an_unfused_run_compiles(monkeypatch):
    monkeypatch.setattr(choice, "_warned", set())
    torch._dynamo.reset()

    def attend(x):
        return x + len(choice.choose(None, torch.device("xpu"), x.dtype, x.shape[-1], "neighborhood", 49))

    with pytest.warns(RuntimeWarning, match="unfused on xpu"):
        result = torch.compile(attend, fullgraph=True, backend="eager", dynamic=True)(torch.ones(2, 8))
    assert result[0, 0] == 1 + len("reference")
