"""No path through autograd drops a derivative: subsets, absent cotangents, tied inputs, residual blocks, penalties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import natten_ext
from natten_ext import geometry
from natten_ext.operators import OPERATORS
from tests.operators.budget import assert_equal_to_rounding
from tests.operators.cases import (
    Case,
    Inputs,
    arguments_of,
    cotangents_of,
    derivatives,
    find,
    forward,
    grad_output_of,
    inputs_of,
    nonempty_subsets,
    oracle_derivatives,
    oracle_forward,
)

SOME = [
    find("full-self-9"),
    find("grid-6x10-w3x5", score="l2", bias=True),
    find("na-7x9-k3", bias=True),
    find("na-11x9-per-head", score="l2", bias=True),
]


def on(target, tensors: Inputs) -> Inputs:
    return {name: tensor.to(target.device) for name, tensor in tensors.items()}


@pytest.mark.cases(SOME)
@pytest.mark.parametrize("grad_output_needs_grad", [True, False])
def test_every_subset_of_inputs_that_require_grad(any_target, case, grad_output_needs_grad):
    """First and second derivatives for every subset of the inputs; the rest are constants."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    cotangents = cotangents_of(case, inputs)
    subsets = nonempty_subsets(inputs)
    for names in subsets[:: 4 if any_target.slow else 1]:
        tensors = on(any_target, inputs)
        for name in names:
            tensors[name].requires_grad_()
        grad_output = grad_output_of(case, tensors["query"].detach()).requires_grad_(grad_output_needs_grad)
        wanted = [tensors[name] for name in names]
        output = forward(case, tensors, any_target.backend)
        first = torch.autograd.grad(output, wanted, grad_output, create_graph=True)
        given = [cotangents[name].to(any_target.device) for name in names]
        leaves = wanted + [grad_output] * grad_output_needs_grad
        second = torch.autograd.grad(first, leaves, given, materialize_grads=True)

        results = {f"d_{name}": grad.detach() for name, grad in zip(names, first, strict=True)}
        labels = [*names, "grad_output"][: len(leaves)]
        results |= {f"dd_{name}": grad for name, grad in zip(labels, second, strict=True)}
        true = oracle_derivatives(case, inputs, grad_output, {name: cotangents[name] for name in names})
        assert_equal_to_rounding(results, {name: true[name] for name in results})


@pytest.mark.cases(SOME[:3])
def test_nothing_requires_grad(any_target, case):
    inputs = inputs_of(case, torch.float32, any_target.device)
    assert not forward(case, inputs, any_target.backend).requires_grad
    inputs["query"].requires_grad_()
    assert forward(case, inputs, any_target.backend).requires_grad
    with torch.no_grad():
        assert not forward(case, inputs, any_target.backend).requires_grad
    with torch.inference_mode():
        assert forward(case, inputs, any_target.backend).is_inference()


@pytest.mark.cases(SOME)
def test_backward_accumulates_into_the_leaves(any_target, case):
    """`.backward()` through a penalty gives what `autograd.grad` gives, added to what is there."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    inputs = inputs_of(case)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    leaves = {name: tensor.requires_grad_() for name, tensor in on(any_target, inputs).items()}
    there = on(any_target, cotangents)
    output = forward(case, leaves, any_target.backend)
    (output * grad_output.to(any_target.device)).sum().backward(create_graph=True)
    firsts = {name: leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = torch.ones_like(leaf)
    sum((firsts[name] * there[name]).sum() for name in leaves).backward()

    true = oracle_derivatives(case, inputs, grad_output, cotangents)
    results = {f"d_{name}": grad.detach() for name, grad in firsts.items()}
    results |= {f"dd_{name}": leaf.grad - 1 for name, leaf in leaves.items()}
    assert_equal_to_rounding(results, {name: true[name] for name in results})


@pytest.mark.cases(SOME)
def test_allow_unused_hides_nothing(any_target, case):
    """A dropped second order would come back as None here, and as a wrong penalty in training."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    leaves = {n: t.requires_grad_() for n, t in inputs_of(case, torch.float64, any_target.device).items()}
    stranger = torch.zeros(3, dtype=torch.float64, device=any_target.device, requires_grad=True)
    output = forward(case, leaves, any_target.backend)
    wanted = [*leaves.values(), stranger]
    *first, none = torch.autograd.grad(output.square().sum(), wanted, create_graph=True, allow_unused=True)
    assert none is None and all(grad is not None and grad.grad_fn is not None for grad in first)
    *second, none = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)
    assert none is None
    for name, grad in zip(leaves, second, strict=True):
        assert grad is not None and grad.abs().max() > 0, name


@pytest.mark.cases(SOME)
def test_first_derivatives_are_the_same_with_and_without_a_graph(any_target, case):
    inputs = inputs_of(case, torch.float32, any_target.device)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    grad_output = grad_output_of(case, inputs["query"].detach())
    output = forward(case, leaves, any_target.backend)
    with_graph = torch.autograd.grad(output, list(leaves.values()), grad_output, create_graph=True)
    without = torch.autograd.grad(output, list(leaves.values()), grad_output, retain_graph=True)
    with torch.no_grad():
        assert torch.equal(forward(case, leaves, any_target.backend), output)
    for one, other in zip(with_graph, without, strict=True):
        assert one.requires_grad and not other.requires_grad
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("score", ["dot", "l2"])
@pytest.mark.parametrize("tied", [("key",), ("key", "value")], ids=["q-is-k", "q-is-k-is-v"])
@pytest.mark.parametrize("name", ["full-self-9", "na-7x9-k3", "grid-6x10-w3x5"])
def test_tied_inputs(any_target, name, tied, score):
    """One tensor in several places gets the sum of their derivatives, in both orders."""
    any_target.skip_unless_can(torch.float64)
    case = find(name, tied=tied, score=score)
    inputs = inputs_of(case)
    grad_output, cotangents = grad_output_of(case, inputs["query"]), cotangents_of(case, inputs)
    results = derivatives(
        lambda leaves: forward(case, leaves, any_target.backend),
        on(any_target, inputs),
        grad_output.to(any_target.device),
        on(any_target, cotangents),
    )
    assert_equal_to_rounding(results, oracle_derivatives(case, inputs, grad_output, cotangents))


# ------------------------------------------------------------------------------------------ gradient penalties


BLOCKS = [
    Case("block-full", "full", (3, 12, 2, 4), small=True),
    Case("block-l2-tied", "full", (3, 12, 2, 4), score="l2", tied=("key",), small=True),
    Case("block-grid", "grid", (3, 4, 6, 2, 4), window=(2, 3), bias=True, small=True),
    Case("block-na", "neighborhood", (3, 6, 7, 2, 4), kernel=(3, 3), dilation=(1, 2), groups=("dilation",), bias=True,
         small=True),
]  # fmt: skip


def block_parameters(case: Case, device: str) -> Inputs:
    """A critic: two residual blocks around the attention, then a nonlinear head."""
    generator = torch.Generator().manual_seed(7)
    width = case.heads * case.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    parameters = {"into": normal(width, 3), "head": normal(1, width)}
    for block in (0, 1):
        parameters |= {f"{block}.{name}": normal(width, width) for name in ("query", "key", "value", "out")}
        if case.bias:
            parameters[f"{block}.bias"] = normal(*case.table_shape)
    return {name: parameter.to(device).requires_grad_() for name, parameter in parameters.items()}


def critic(case: Case, parameters: Inputs, images: Tensor, attend) -> Tensor:
    x = images @ parameters["into"].T
    for block in (0, 1):
        normed = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
        inputs = {}
        for name in ("query", "key", "value"):
            if name not in case.tied:
                inputs[name] = (normed @ parameters[f"{block}.{name}"].T).unflatten(-1, case.shape[-2:])
        if case.bias:
            inputs["bias"] = parameters[f"{block}.bias"]
        x = x + attend(inputs).flatten(-2) @ parameters[f"{block}.out"].T
    return torch.tanh(x.flatten(1, -2).mean(1)) @ parameters["head"].T


def wgan_gp_gradients(case: Case, device: str, attend, second_order: bool = True) -> Inputs:
    """Gradients of a critic's loss with a gradient penalty, with respect to its parameters."""
    generator = torch.Generator().manual_seed(8)
    shape = (*case.shape[:-2], 3)
    real, fake = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    mixed = (0.3 * real + 0.7 * fake).requires_grad_()
    parameters = block_parameters(case, device)
    slope = torch.autograd.grad(critic(case, parameters, mixed, attend).sum(), mixed, create_graph=second_order)[0]
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    loss = critic(case, parameters, fake, attend).mean() - critic(case, parameters, real, attend).mean()
    (loss + 10 * penalty).backward()
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


@pytest.mark.cases(BLOCKS)
def test_wgan_gp_penalty_through_residual_blocks(any_target, case):
    """The second order reaches every parameter; a library that drops it silently fails here by tens of percent."""
    any_target.skip_unless_can(torch.float64, case.head_dim)
    true = wgan_gp_gradients(case, "cpu", lambda inputs: oracle_forward(case, inputs))
    results = wgan_gp_gradients(case, any_target.device, lambda inputs: forward(case, inputs, any_target.backend))
    assert set(results) == set(true)
    for name in true:
        scale = true[name].abs().max()
        assert (results[name].cpu() - true[name]).abs().max() <= 1e-9 * scale, name


@pytest.mark.cases(BLOCKS)
def test_the_penalty_test_can_see_a_dropped_second_order(case):
    """An attention whose backward is a constant to autograd, as in several libraries, changes the gradients a lot."""

    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return oracle_forward(case, dict(zip(ctx_names, tensors, strict=True)))

        @staticmethod
        def backward(ctx, grad_output):
            with torch.enable_grad():
                tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
                output = oracle_forward(case, dict(zip(ctx_names, tensors, strict=True)))
            return torch.autograd.grad(output, tensors, grad_output.detach())

    ctx_names = [n for n in ("query", "key", "value") if n not in case.tied] + ["bias"] * case.bias

    true = wgan_gp_gradients(case, "cpu", lambda inputs: oracle_forward(case, inputs))
    wrong = wgan_gp_gradients(case, "cpu", lambda inputs: Dropped.apply(*(inputs[name] for name in ctx_names)))
    worst = max(float((wrong[name] - true[name]).norm() / true[name].norm()) for name in true if name in wrong)
    assert worst > 0.05


# ------------------------------------------------------------------------------------------ the third order


def second_derivatives(case: Case, target, leaves: Inputs) -> tuple[Inputs, list[Tensor]]:
    """Second derivatives with a graph, and everything that they depend on."""
    grad_output = grad_output_of(case, leaves["query"].detach()).requires_grad_()
    cotangents = {n: t.requires_grad_() for n, t in cotangents_of(case, leaves).items()}
    output = forward(case, leaves, target.backend)
    first = torch.autograd.grad(output, list(leaves.values()), grad_output, create_graph=True)
    names = [*leaves, "grad_output"]
    second = torch.autograd.grad(
        first, [*leaves.values(), grad_output], [cotangents[name] for name in leaves], create_graph=True
    )
    sources = [*leaves.values(), grad_output, *cotangents.values()]
    return dict(zip(names, second, strict=True)), sources


@pytest.mark.cases(SOME)
def test_a_third_derivative_raises(target, case):
    """Whatever is differentiated with respect to whatever, and `allow_unused` does not turn it into None."""
    leaves = {n: t.requires_grad_() for n, t in inputs_of(case, torch.float32, target.device).items()}
    second, sources = second_derivatives(case, target, leaves)
    for result in second.values():
        for source in sources:
            with pytest.raises(RuntimeError, match="third"):
                torch.autograd.grad(result.square().sum(), source, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="third"):
        sum(result.square().sum() for result in second.values()).backward()


@pytest.mark.cases(SOME[1:3])
def test_reference_has_a_third_derivative(case):
    def third(attend) -> list[Tensor]:
        leaves = {n: t.requires_grad_() for n, t in inputs_of(case).items()}
        value = attend(leaves).sin().sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
            value = sum(grad.sin().sum() for grad in grads)
        return list(grads)

    result = third(lambda leaves: forward(case, leaves, "reference"))
    for one, other in zip(result, third(lambda leaves: oracle_forward(case, leaves)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def reverse_over_reverse(loss, point: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in point]
    slopes = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    return list(torch.autograd.grad(slopes, leaves, direction))


def reverse_over_forward(loss, point: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in point]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves, direction, strict=True)]
        slope = forward_ad.unpack_dual(loss(*duals)).tangent
    return list(torch.autograd.grad(slope, leaves))


def forward_over_reverse(loss, point: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.clone().requires_grad_(), t) for x, t in zip(point, direction, strict=True)]
        slopes = torch.autograd.grad(loss(*duals), duals)
        return [forward_ad.unpack_dual(slope).tangent for slope in slopes]


def forward_over_forward(loss, point: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
    """Of the first argument: the others take a column of the Hessian for each of their elements."""

    def slope(*x: Tensor) -> Tensor:
        return torch.func.jvp(loss, x, tuple(direction))[1]

    return [torch.func.jacfwd(slope)(*point)]


@pytest.mark.cases([*SOME, replace(SOME[3], score="dot")])
@pytest.mark.parametrize("mode", [reverse_over_forward, forward_over_reverse, forward_over_forward])
def test_reference_in_every_mode_of_differentiation(case, mode):
    """The Hessian times a vector, four ways, of the attention and of its weights."""
    inputs = inputs_of(case)
    point, direction = list(inputs.values()), list(cotangents_of(case, inputs).values())

    def loss(attend):
        return lambda *tensors: attend(dict(zip(inputs, tensors, strict=True))).sin().sum()

    def weights(tensors: Inputs) -> Tensor:
        neighborhood = {"grid": {"window_size": case.window}, "full": {}}.get(
            case.kind, {"kernel_size": case.argument("kernel"), "dilation": case.argument("dilation")}
        )
        query, key, value, table = arguments_of(case, tensors)
        positions = [(2, 1), (0, 3)] if query.dim() == 5 else [4, 0]
        rows = natten_ext.attention_weights(query, key, positions, bias=table, score=case.score, **neighborhood)
        return rows.square().sum() + 0 * value.sum()

    true = reverse_over_reverse(loss(lambda tensors: oracle_forward(case, tensors)), point, direction)
    results = mode(loss(lambda tensors: forward(case, tensors, "reference")), point, direction)
    for result, expected in zip(results, true, strict=False):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)
    true = reverse_over_reverse(loss(weights), point, direction)
    for result, expected in zip(mode(loss(weights), point, direction), true, strict=False):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------ around the op


@pytest.mark.cases(SOME[:3])
@pytest.mark.parametrize("order", ["first", "second"])
def test_activation_checkpointing(any_target, case, order):
    any_target.skip_unless_can(torch.float64, case.head_dim)

    def gradients(run) -> list[Tensor]:
        leaves = {n: t.requires_grad_() for n, t in inputs_of(case, torch.float64, any_target.device).items()}
        loss = run(leaves).sin().sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=order == "second")
        if order == "second":
            grads = torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()))
        return list(grads)

    def plain(leaves: Inputs) -> Tensor:
        return forward(case, leaves, any_target.backend)

    expected = gradients(plain)
    for one, other in zip(
        gradients(lambda leaves: checkpoint(plain, leaves, use_reentrant=False)), expected, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.cases(SOME[1:2])
def test_in_place_changes_of_saved_tensors_are_caught(target, case):
    inputs = inputs_of(case, torch.float32, target.device)
    for changed in [*inputs, "output"]:
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        copies = {n: leaf.clone() for n, leaf in leaves.items()}
        output = forward(case, copies, target.backend)
        with torch.no_grad():
            (output if changed == "output" else copies[changed]).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.cases(SOME[1:2])
def test_in_place_changes_between_the_orders_are_caught(target, case):
    leaves = {n: t.requires_grad_() for n, t in inputs_of(case, torch.float32, target.device).items()}
    copies = {n: leaf.clone() for n, leaf in leaves.items()}
    first = torch.autograd.grad(
        forward(case, copies, target.backend).square().sum(), list(copies.values()), create_graph=True
    )
    with torch.no_grad():
        copies["key"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(grad.square().sum() for grad in first).backward()


def jvp_by_dual_numbers(function, query: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(query, tangent)))
        return torch.zeros_like(query) if dual.tangent is None else dual.tangent


def batched_gradients(function, query: Tensor, stack: Tensor) -> Tensor:
    query = query.clone().requires_grad_()
    return torch.autograd.grad(function(query), query, stack, is_grads_batched=True)[0]


TRANSFORMS = {
    "func.grad": lambda f, query, stack: torch.func.grad(lambda q: f(q).square().sum())(query),
    "func.vjp": lambda f, query, stack: torch.func.vjp(f, query)[1](stack[1])[0],
    "func.vmap": lambda f, query, stack: torch.func.vmap(f)(stack),
    "func.jvp": lambda f, query, stack: torch.func.jvp(f, (query,), (stack[1],))[1],
    "func.hessian": lambda f, query, stack: torch.func.hessian(lambda q: f(q)[0, 0].square().sum())(query),
    "dual numbers": lambda f, query, stack: jvp_by_dual_numbers(f, query, stack[1]),
    "dual numbers of a leaf": lambda f, query, stack: jvp_by_dual_numbers(f, query.requires_grad_(), stack[1]),
    "batched gradients": batched_gradients,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_work_or_say_that_they_do_not(target, name):
    """Right or an error; never a silent zero."""
    target.skip_unless_can(torch.float64)
    inputs = inputs_of(find("full-self-9"), torch.float64, target.device)
    query, rest = inputs["query"], {n: t for n, t in inputs.items() if n != "query"}
    stack = torch.stack([query, query.flip(1)])

    def attend(backend: str):
        return lambda q: forward(find("full-self-9"), rest | {"query": q}, backend)

    expected = TRANSFORMS[name](attend("reference"), query.clone(), stack)
    try:
        result = TRANSFORMS[name](attend(target.backend), query.clone(), stack)
    except (RuntimeError, NotImplementedError) as error:
        assert str(error)
    else:
        torch.testing.assert_close(result.detach(), expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["func.grad", "func.vjp", "func.jvp", "func.hessian", "dual numbers"])
def test_transforms_that_cannot_be_name_the_backend_that_can(target, name):
    target.skip_unless_can(torch.float64)
    query = torch.randn(1, 4, 2, 8, dtype=torch.float64, device=target.device)
    with pytest.raises(RuntimeError, match=r'natten_ext.*backend="reference"'):
        TRANSFORMS[name](
            lambda q: natten_ext.attention(q, query, query, backend=target.backend), query, torch.stack([query, query])
        )


def test_autograd_through_vmap(target):
    target.skip_unless_can(torch.float64)
    stack = torch.randn(2, 1, 4, 2, 8, dtype=torch.float64, device=target.device)

    def penalty(function) -> Tensor:
        query = stack.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(query).square().sum(), query, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), query)[0]

    def attend(q: Tensor) -> Tensor:
        return natten_ext.attention(q, stack[0], stack[1], backend=target.backend)

    expected = penalty(lambda query: torch.stack([attend(q) for q in query]))
    torch.testing.assert_close(penalty(torch.func.vmap(attend)), expected, rtol=1e-10, atol=1e-10)


OPERANDS = ["query", "key", "value", "bias", "grad_output", "cot_query", "cot_key", "cot_value", "cot_bias"]


@pytest.mark.cases(SOME[1:3])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "not-recorded"])
@pytest.mark.parametrize("name", OPERANDS)
def test_a_tangent_anywhere_raises(target, case, name, recorded):
    """In every operand of every order, whether or not a gradient of the result is recorded."""
    inputs = inputs_of(case, torch.float32, target.device)
    leaves = {n: t.requires_grad_(recorded or name.startswith(("grad", "cot"))) for n, t in inputs.items()}
    given = {"grad_output": grad_output_of(case, inputs["query"].detach())}
    given |= {f"cot_{n}": t for n, t in cotangents_of(case, inputs).items()}

    def derivatives_with_a_tangent() -> None:
        operands = leaves | given
        operands[name] = forward_ad.make_dual(operands[name], torch.ones_like(operands[name]))
        output = forward(case, {n: operands[n] for n in leaves}, target.backend)
        more = recorded or name.startswith("cot")
        first = torch.autograd.grad(output, list(leaves.values()), operands["grad_output"], create_graph=more)
        cotangents = [operands[f"cot_{n}"] for n in leaves]
        torch.autograd.grad(first, list(leaves.values()), cotangents, create_graph=recorded)

    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivatives"):
        derivatives_with_a_tangent()


@pytest.mark.cases(SOME[1:2])
def test_a_tangent_in_a_direct_call_of_an_operator_raises(target, case):
    """Operators, not only the functions, refuse tangents: no gradient is recorded here."""
    inputs = inputs_of(case, torch.float32, target.device)
    choices = [geometry.Grid(case.window).encode(), case.score == "l2", 0.5]
    needs, operators = [True] * 4, OPERATORS[target.backend]
    output, lse = operators.forward(*inputs.values(), *choices)
    arguments = {
        "forward": [*inputs.values(), *choices],
        "backward": [output, *inputs.values(), output, lse, *choices, needs],
        "double_backward": [
            *inputs.values(), output, *inputs.values(), output, lse, *choices, [True, *needs]
        ],
    }  # fmt: skip
    for name, given in arguments.items():
        for position, argument in enumerate(given):
            if not isinstance(argument, Tensor):
                continue
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(argument, torch.ones_like(argument))
                with pytest.raises(RuntimeError, match="forward-mode derivatives"):
                    getattr(operators, name)(*given[:position], dual, *given[position + 1 :])


@pytest.mark.cases(SOME)
def test_hooks_get_gradients(any_target, case):
    """On inputs, output and first gradients, under a penalty: no hook sees None, and the output's sees what it would
    see in plain PyTorch."""
    any_target.skip_unless_can(torch.float64, case.head_dim)

    def seen_by_hooks(attend, device: str) -> Inputs:
        leaves = {n: t.requires_grad_() for n, t in inputs_of(case, device=device).items()}
        seen: dict[str, list[Tensor]] = {}

        def hook(name: str, tensor: Tensor) -> Tensor:
            tensor.register_hook(lambda grad: seen.setdefault(name, []).append(grad.detach().clone()))
            return tensor

        output = hook("output", attend({n: hook(n, t * 1) for n, t in leaves.items()}))
        slopes = torch.autograd.grad(output.square().sum(), list(leaves.values()), create_graph=True)
        penalty = sum(hook(f"d_{n}", slope).square().sum() for n, slope in zip(leaves, slopes, strict=True))
        (penalty + output.sum()).backward()
        return {f"{name} {i}": grad for name, grads in seen.items() for i, grad in enumerate(grads)}

    true = seen_by_hooks(lambda leaves: oracle_forward(case, leaves), "cpu")
    assert {"output 0", "output 1"} <= true.keys()
    results = seen_by_hooks(lambda leaves: forward(case, leaves, any_target.backend), any_target.device)
    assert_equal_to_rounding(results, true)


@pytest.mark.cases(SOME[1:3])
@pytest.mark.parametrize("names", [("query",), ("key", "bias")], ids="-".join)
def test_a_hook_on_the_output_where_only_the_slope_is_penalised(any_target, case, names):
    """A loss linear in the output: its second derivative does not pass through the output, as in plain PyTorch."""
    leaves = {n: t.requires_grad_(n in names) for n, t in inputs_of(case, torch.float32, any_target.device).items()}
    output = forward(case, leaves, any_target.backend)
    seen = []
    output.register_hook(lambda grad: seen.append(grad.square().sum()))
    wanted = [leaves[name] for name in names]
    slopes = torch.autograd.grad(output.sum(), wanted, create_graph=True)
    sum(slope.square().sum() for slope in slopes).backward()
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_runs_in_the_autocast_dtype(any_target, dtype):
    any_target.skip_unless_can(dtype)
    case = find("na-7x9-k3", bias=True)
    inputs = inputs_of(case, torch.float32, any_target.device)
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    with torch.autocast(any_target.device, dtype=dtype):
        output = forward(case, leaves, any_target.backend)
    assert output.dtype == dtype
    halves = {n: t.clone().requires_grad_() if n == "bias" else t.to(dtype).requires_grad_() for n, t in inputs.items()}
    expected = forward(case, halves, any_target.backend)
    assert torch.equal(output, expected)
    grad_output = grad_output_of(case, expected.detach())
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output)
    for grad, other in zip(grads, torch.autograd.grad(expected, list(halves.values()), grad_output), strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, other.float())


def test_autocast_leaves_float64_alone(any_target):
    any_target.skip_unless_can(torch.float64)
    case = find("full-self-9")
    with torch.autocast(any_target.device, dtype=torch.bfloat16):
        assert forward(case, inputs_of(case, device=any_target.device), any_target.backend).dtype == torch.float64


def test_autocast_unifies_mixed_dtypes(any_target):
    """A projection under autocast gives bfloat16 beside a float32 buffer."""
    any_target.skip_unless_can(torch.bfloat16)
    query, key, value = torch.randn(3, 2, 5, 2, 8, device=any_target.device).unbind(0)
    with torch.autocast(any_target.device, dtype=torch.bfloat16):
        output = natten_ext.attention(query.bfloat16(), key, value, backend=any_target.backend)
    expected = natten_ext.attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), backend=any_target.backend)
    assert torch.equal(output, expected)


@pytest.mark.cases(SOME)
def test_a_penalty_on_part_of_the_output(any_target, case):
    """A slice of the output, a slice of the gradient: cotangents that are zero almost everywhere."""
    any_target.skip_unless_can(torch.float64, case.head_dim)

    def gradients(attend, device: str) -> Inputs:
        leaves = {n: t.requires_grad_() for n, t in inputs_of(case, device=device).items()}
        (slope,) = torch.autograd.grad(attend(leaves)[:1, 1].square().sum(), leaves["key"], create_graph=True)
        grads = torch.autograd.grad(slope[..., 0].square().sum(), list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))

    true = gradients(lambda leaves: oracle_forward(case, leaves), "cpu")
    results = gradients(lambda leaves: forward(case, leaves, any_target.backend), any_target.device)
    assert_equal_to_rounding(results, true)


@pytest.mark.cases([replace(case, shape=(0, *case.shape[1:])) for case in SOME])
def test_an_empty_batch_has_zero_gradients(any_target, case):
    leaves = {n: t.requires_grad_() for n, t in inputs_of(case, torch.float32, any_target.device).items()}
    output = forward(case, leaves, any_target.backend)
    assert output.shape == case.shape
    first = torch.autograd.grad(output.sum(), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()), materialize_grads=True)
    for leaf, *grads in zip(leaves.values(), first, second, strict=True):
        for grad in grads:
            assert grad.shape == leaf.shape and not grad.any()
