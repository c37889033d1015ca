"""`torch.func` over the operators and modules: each transform gives what it gives for the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import natten_ext
from tests.operators.cases import TINY, Case, cotangents_of, find, forward, grad_output_of, inputs_of, nonempty_subsets

pytestmark = pytest.mark.samples(interpreted=0)

TABLES = [case for case in TINY if case.bias]
SMALL = [find("full-tiny-cross"), *TABLES]


def close(result, expected) -> None:
    results, expecteds = ([x] if isinstance(x, Tensor) else list(x) for x in (result, expected))
    for one, other in zip(results, expecteds, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def attend_of(case: Case, names: list[str], backend: str, others: dict[str, Tensor] | None = None):
    """The attention as a function of its inputs, in this order."""
    return lambda *tensors: forward(case, (others or {}) | dict(zip(names, tensors, strict=True)), backend)


def tensors_of(case: Case, device: str) -> tuple[list[str], list[Tensor], list[Tensor], Tensor]:
    inputs = inputs_of(case, device=device)
    tangents = cotangents_of(case, inputs)
    return list(inputs), list(inputs.values()), list(tangents.values()), grad_output_of(case, inputs["query"])


def transforms(attend, tensors: list[Tensor], tangents: list[Tensor], y: Tensor, argument: int) -> dict:
    """By name, what to compute; loops over elements are of one argument."""
    every = tuple(range(len(tensors)))

    def loss(*x: Tensor) -> Tensor:
        return (attend(*x) * y).sin().sum()

    def of_one(x: Tensor) -> Tensor:
        return loss(*tensors[:argument], x, *tensors[argument + 1 :])

    x, t = tensors[argument], tangents[argument]
    return {
        "grad": lambda: grad(loss, every)(*tensors),
        "vjp": lambda: vjp(attend, *tensors)[1](y),
        "jvp": lambda: jvp(attend, tuple(tensors), tuple(tangents)),
        "linearize": lambda: linearize(attend, *tensors)[1](*tangents),
        "jacrev": lambda: jacrev(lambda x: attend(*tensors[:argument], x, *tensors[argument + 1 :]).sum(-1))(x),
        "jacfwd": lambda: jacfwd(lambda x: attend(*tensors[:argument], x, *tensors[argument + 1 :]).sum(-1))(x),
        "hessian": lambda: hessian(of_one)(x),
        "jacrev of jacrev": lambda: jacrev(jacrev(of_one))(x),
        "jacrev of jacfwd": lambda: jacrev(jacfwd(of_one))(x),
        "grad of grad": lambda: grad(lambda *x: sum(g.sin().sum() for g in grad(loss, every)(*x)), every)(*tensors),
        "grad of jvp": lambda: grad(lambda *x: jvp(loss, x, tuple(tangents))[1], every)(*tensors),
        "jvp of grad": lambda: jvp(grad(loss, every), tuple(tensors), tuple(tangents))[1],
        "hvp": lambda: torch.autograd.functional.hvp(loss, tuple(tensors), tuple(tangents))[1],
        "vhp": lambda: torch.autograd.functional.vhp(loss, tuple(tensors), tuple(tangents))[1],
        "functional.hessian": lambda: torch.autograd.functional.hessian(of_one, x),
        "functional.jvp": lambda: torch.autograd.functional.jvp(of_one, x, t)[1],
    }


NAMES = list(transforms(None, [torch.zeros(0)], [torch.zeros(0)], torch.zeros(0), 0))


@pytest.mark.cases(SMALL)
@pytest.mark.parametrize("name", NAMES)
def test_transforms(target, case, name):
    target.skip_unless_can(torch.float64, case.head_dim)
    names, tensors, tangents, y = tensors_of(case, target.device)
    arguments = range(len(tensors)) if "jac" in name or "hess" in name else [0]
    for argument in list(arguments)[-1 if target.slow else 0 :]:
        result, expected = (
            transforms(attend_of(case, names, backend), tensors, tangents, y, argument)[name]()
            for backend in (target.backend, "reference")
        )
        close(result, expected)


@pytest.mark.cases(SMALL)
@pytest.mark.parametrize("dim", [0, -1])
def test_vmap_over_every_subset_of_inputs(target, case, dim):
    target.skip_unless_can(torch.float64, case.head_dim)
    names, tensors, _, _ = tensors_of(case, target.device)
    stacked = [torch.stack([x, 2 * x, x - 1], dim) for x in tensors]
    attend = attend_of(case, names, target.backend)
    for subset in nonempty_subsets(names)[:: -3 if target.slow else 1]:
        mapped = [n in subset for n in names]
        chosen = [s if m else x for s, m, x in zip(stacked, mapped, tensors, strict=True)]
        result = vmap(attend, tuple(dim if m else None for m in mapped))(*chosen)
        for i in range(3):
            close(result[i], attend(*(x.select(dim, i) if m else x for m, x in zip(mapped, chosen, strict=True))))


@pytest.mark.cases(SMALL)
def test_vmap_over_nothing(target, case):
    """Of every order, with tables for each entry and without."""
    target.skip_unless_can(torch.float64, case.head_dim)
    names, tensors, _, _ = tensors_of(case, target.device)
    attend = attend_of(case, names, target.backend)
    every = tuple(range(len(tensors)))
    slopes = grad(lambda *x: attend(*x).square().sum(), every)
    for mapped in ([True] * len(names), [name == "query" for name in names]):
        given = [x.new_empty((0, *x.shape)) if m else x for m, x in zip(mapped, tensors, strict=True)]
        dims = tuple(0 if m else None for m in mapped)
        assert vmap(attend, dims)(*given).shape == (0, *tensors[0].shape)
        assert [g.shape for g in vmap(slopes, dims)(*given)] == [(0, *x.shape) for x in tensors]
        second = vmap(lambda *x: jvp(slopes, x, x)[1], dims)(*given)
        assert [g.shape for g in second] == [(0, *x.shape) for x in tensors]


@pytest.mark.cases(SMALL)
def test_per_sample_gradients(target, case):
    """vmap of grad, over the batch: of tensors that samples share, a gradient for each."""
    target.skip_unless_can(torch.float64, case.head_dim)
    names, tensors, _, y = tensors_of(case, target.device)
    attend = attend_of(case, names, target.backend)
    samples = [torch.stack([x, -x, 3 * x]) for x in tensors[:1]]

    def loss(query: Tensor, *others: Tensor) -> Tensor:
        return (attend(query, *others) * y).sin().sum()

    every = tuple(range(len(tensors)))
    result = vmap(grad(loss, every), (0, *[None] * (len(tensors) - 1)))(*samples, *tensors[1:])
    for i, query in enumerate(samples[0]):
        close([r[i] for r in result], grad(loss, every)(query, *tensors[1:]))


@pytest.mark.cases(SMALL)
def test_batched_gradients(target, case):
    """`is_grads_batched` maps the backward, of the first and of the second order, over incoming gradients."""
    target.skip_unless_can(torch.float64, case.head_dim)
    names, tensors, _, y = tensors_of(case, target.device)
    stack = torch.stack([y, 2 * y, y.square()])

    def gradients(backend: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        output = attend_of(case, names, backend)(*leaves)
        first = torch.autograd.grad(output, leaves, stack, is_grads_batched=True, create_graph=True)
        slope = torch.autograd.grad(output.sin().sum(), leaves[0], create_graph=True)[0]
        stacked = torch.stack([leaves[0].detach(), slope.detach()])
        return [*first, *torch.autograd.grad(slope, leaves, stacked, is_grads_batched=True)]

    close(gradients(target.backend), gradients("reference"))


@pytest.mark.cases(TABLES[:2])
def test_vmap_twice_and_grad_through_it(target, case):
    target.skip_unless_can(torch.float64, case.head_dim)
    names, tensors, _, y = tensors_of(case, target.device)
    queries, tables = (torch.stack([x, 2 * x]) for x in (tensors[0], tensors[-1]))

    def of(backend: str):
        attend = attend_of(case, names, backend)
        outer = (0, *[None] * (len(tensors) - 1))
        inner = (*[None] * (len(tensors) - 1), 0)
        both = vmap(vmap(attend, inner), outer)
        return lambda q, b: (both(q, *tensors[1:-1], b) * y).sin().sum()

    close(*(grad(of(backend), (0, 1))(queries, tables) for backend in (target.backend, "reference")))


def test_functional_call_on_a_module(target):
    """A penalty and per-sample gradients of a layer's parameters, which include its table."""
    target.skip_unless_can(torch.float64, 4)
    torch.manual_seed(0)
    layer = natten_ext.NeighborhoodAttention(8, 2, 3, bias=True, backend=target.backend).double().to(target.device)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    images = torch.randn(3, 5, 4, 8, dtype=torch.float64, device=target.device)

    def loss(parameters, image: Tensor) -> Tensor:
        return functional_call(layer, parameters, (image[None],)).sin().sum()

    def penalty(parameters) -> Tensor:
        return vmap(grad(loss, 1), (None, 0))(parameters, images).square().sum()

    samples, slopes = vmap(grad(loss), (None, 0))(parameters, images), grad(penalty)(parameters)
    layer.backend = "reference"
    for name in parameters:
        close(samples[name], torch.stack([grad(loss)(parameters, image)[name] for image in images]))
        close(slopes[name], grad(penalty)(parameters)[name])


@pytest.mark.cases(TABLES[1:3])
@pytest.mark.parametrize("name", ["grad", "jvp", "penalty", "grad of jvp"])
def test_compiled(target, case, name):
    """fullgraph, so that no part falls back to Python."""
    target.skip_unless_can(torch.float64, case.head_dim)
    names, tensors, tangents, y = tensors_of(case, target.device)

    def of(backend: str):
        attend = attend_of(case, names, backend)

        def loss(*x: Tensor) -> Tensor:
            return (attend(*x) * y).sin().sum()

        return {
            "grad": grad(loss),
            "jvp": lambda *x: jvp(attend, x, tuple(tangents))[1],
            "penalty": grad(lambda *x: grad(loss)(*x).square().sum(), len(names) - 1),
            "grad of jvp": grad(lambda *x: jvp(loss, x, tuple(tangents))[1]),
        }[name]

    torch._dynamo.reset()
    close(torch.compile(of(target.backend), fullgraph=True, backend="aot_eager")(*tensors), of("reference")(*tensors))
