"""The weights of chosen queries: against the oracle, which forms the whole matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import natten_ext
from tests.operators.cases import CASES, SIZES, Case, arguments_of, find, inputs_of, unshared_arguments_of
from tests.operators.oracle import pair_tables, table_index

# One of each neighborhood, score and table; every problem whose maps or kernels are peculiar.
WEIGHT_CASES = [case for case in CASES if case.small and case.shape[0]]


def full_weights(case: Case, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(batch, queries, heads, keys)` from the oracle's sets."""
    query, key, _, table = unshared_arguments_of(case, inputs)
    query, key = query.flatten(1, -3), key.flatten(1, -3)
    weights = []
    for head, sets in enumerate(case.neighbors):
        allowed, offsets = pair_tables(sets, key.shape[1])
        q, k = query[:, :, head], key[:, :, head]
        distance = q.unsqueeze(2) - k.unsqueeze(1)
        scores = q @ k.mT if case.score == "dot" else -distance.square().sum(-1)
        scores = scores * case.effective_scale
        if table is not None:
            scores = scores + table[head].flatten()[table_index(offsets, table)]
        weights.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1))
    return torch.stack(weights, 2)


def options_of(case: Case, inputs: dict[str, torch.Tensor]) -> dict:
    options = {"score": case.score, "scale": case.scale, "bias": inputs.get("bias")}
    if case.kind == "grid":
        options["window_size"] = case.window
    elif case.kind == "neighborhood":
        options |= dict(zip(("kernel_size", "dilation", "stride"), map(case.argument, SIZES), strict=True))
        options["is_causal"] = case.causal
    return options


@pytest.mark.cases(WEIGHT_CASES)
def test_weights_of_some_queries_are_rows_of_the_whole_matrix(case):
    inputs = inputs_of(case)
    query, key, _, _ = arguments_of(case, inputs)
    extents = case.shape[1:-2]
    chosen = torch.randperm(math.prod(extents))[:7]
    chosen = torch.cat([chosen, chosen[:1]])  # a position may be asked for twice
    positions = chosen if len(extents) == 1 else torch.stack(torch.unravel_index(chosen, extents), 1)
    weights = natten_ext.attention_weights(query, key, positions, **options_of(case, inputs))
    expected = full_weights(case, inputs)[:, chosen]
    assert weights.shape == (case.shape[0], len(chosen), case.heads, *key.shape[1:-2])
    torch.testing.assert_close(weights.flatten(3), expected, rtol=1e-12, atol=1e-13)
    for head, sets in enumerate(case.neighbors):  # exactly zero where no key is
        for place, query_index in enumerate(chosen.tolist()):
            keys = [key for key, _ in sets[query_index]]
            outside = weights[:, place, head].flatten(1).clone()
            outside[:, keys] = 0
            assert not outside.any()


@pytest.mark.parametrize("name", ["full-self-9", "grid-6x10-w3x5", "na-9x10-kernels", "na-11x9-per-head"])
def test_weights_times_values_are_the_fused_output(name):
    case = find(name)
    inputs = inputs_of(case, torch.float32)
    query, key, value, _ = arguments_of(case, inputs)
    options = options_of(case, inputs)
    positions = [0, 5, 3] if case.kind == "full" else [(0, 0), (4, 2), (5, 7)]
    weights = natten_ext.attention_weights(query, key, positions, **options).flatten(3)
    output = torch.einsum("bphk,bkhd->bphd", weights, value.flatten(1, -3))
    function = {"full": natten_ext.attention, "grid": natten_ext.grid_attention}.get(
        case.kind, natten_ext.neighborhood_attention
    )
    if case.kind == "full":
        options.pop("bias")
    whole = function(query, key, value, **options)
    rows = whole[:, positions] if case.kind == "full" else torch.stack([whole[:, y, x] for y, x in positions], 1)
    torch.testing.assert_close(output, rows)


def test_a_map_without_window_or_kernel_attends_everywhere():
    query, key = torch.randn(2, 1, 3, 4, 2, 5).double().unbind(0)
    weights = natten_ext.attention_weights(query, key, [(2, 1)])
    expected = (query[0, 2, 1, :, None] * key[0].flatten(0, 1).transpose(0, 1)).sum(-1).div(5**0.5).softmax(-1)
    torch.testing.assert_close(weights[0, 0], expected.unflatten(-1, (3, 4)))


def test_half_precision_gives_float32_and_autocast_halves_the_inputs():
    query, key = torch.randn(2, 1, 6, 6, 2, 8).unbind(0)
    half = natten_ext.attention_weights(query.bfloat16(), key.bfloat16(), [(1, 1)], kernel_size=3)
    assert half.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(natten_ext.attention_weights(query, key, [(1, 1)], kernel_size=3), half)


def test_gradient_of_a_table_is_added_in_float32():
    """1024 queries; in bfloat16 their shares of 1/9 each would end at 32."""
    z = torch.zeros(1, 32, 32, 1, 4, dtype=torch.bfloat16)
    table = torch.zeros(1, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    positions = [(y, x) for y in range(32) for x in range(32)]
    weights = natten_ext.attention_weights(z, z, positions, kernel_size=3, bias=table)
    own = weights.flatten(3)[0, :, 0].diagonal()
    (gradient,) = torch.autograd.grad(own.sum(), table)
    torch.testing.assert_close(gradient[0, 2, 2], torch.tensor(1024 * (1 / 9 - 1 / 81)).bfloat16())


def test_l2_weights_far_from_the_origin():
    query, key = torch.randn(2, 1, 5, 1, 16).unbind(0)
    far = natten_ext.attention_weights(query + 1000, key + 1000, range(5), score="l2")
    exact = natten_ext.attention_weights((query + 1000).double(), (key + 1000).double(), range(5), score="l2")
    torch.testing.assert_close(far, exact.float(), rtol=1e-5, atol=1e-6)


def test_weights_can_be_differentiated():
    case = find("na-tiny", score="l2", bias=True)
    query, key, _, table = (x.requires_grad_() for x in arguments_of(case, inputs_of(case)))

    def function(q, k, t):
        return natten_ext.attention_weights(q, k, [(0, 1), (3, 4)], **(options_of(case, inputs_of(case)) | {"bias": t}))

    assert torch.autograd.gradcheck(function, (query, key, table))


@pytest.mark.parametrize("kind", ["Attention", "L2Attention", "GridAttention", "NeighborhoodAttention"])
def test_modules_say_where_they_look(kind):
    """The module's output at a position is its weights' mean of the values, projected."""
    options = {
        "GridAttention": {"window_size": 3},
        "NeighborhoodAttention": {"kernel_size": [3, 2], "dilation": [1, 2]},
    }
    module = getattr(natten_ext, kind)(8, 2, **options.get(kind, {})).double()
    x = torch.randn(2, 6, 6, 8).double()
    positions = [(0, 0), (4, 3)]
    if kind in ("Attention", "L2Attention"):
        x, positions = x.flatten(1, 2), [0, 27]
    if kind.endswith("hoodAttention") or kind == "GridAttention":
        torch.nn.init.normal_(module.rel_pos_bias)
    weights = module.attention_weights(x, positions).flatten(3)
    value = module._project(x)[-1].flatten(1, -3)
    expected = module.proj(torch.einsum("bphk,bkhd->bphd", weights, value).flatten(2))
    whole = module(x)
    rows = whole[:, positions] if x.dim() == 3 else torch.stack([whole[:, a, b] for a, b in positions], 1)
    torch.testing.assert_close(expected, rows)


M = torch.zeros(2, 6, 8, 4, 8)
S = torch.zeros(2, 6, 2, 8)


def nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(tensor), layout=torch.jagged)


@pytest.mark.parametrize(
    ("arguments", "options", "exception", "pieces"),
    [
        ((M, M, [(0, 8)]), {}, ValueError, ["positions", "(6, 8)", "8"]),
        ((M, M, [(-1, 0)]), {}, ValueError, ["positions", "-1"]),
        ((M, M, [1, 2]), {}, ValueError, ["positions", "(P, 2)"]),
        ((S, S, [(1, 2)]), {}, ValueError, ["positions", "(P,)"]),
        ((S, S, []), {}, ValueError, ["positions", "at least one"]),
        ((S, S, [0.5]), {}, TypeError, ["positions", "float32"]),
        ((S, S, [True]), {}, TypeError, ["positions", "bool"]),
        ((S, S, None), {}, TypeError, ["positions", "(P,)", "None"]),
        ((M, M, {}), {}, TypeError, ["positions", "(P, 2)", "{}"]),
        ((M, M, {(0, 0): 1}), {}, TypeError, ["positions", "{(0, 0): 1}"]),
        ((M, M, "00"), {}, TypeError, ["positions", "'00'"]),
        ((M, M, [(0, 0), (1,)]), {}, ValueError, ["positions", "[(0, 0), (1,)]"]),
        ((S, S, [0, None]), {}, ValueError, ["positions", "[0, None]"]),
        ((S, S, [2**70]), {}, ValueError, ["positions", "64-bit", str(2**70)]),
        ((S, S, torch.tensor([0], device="meta")), {}, ValueError, ["positions", "meta"]),
        ((S, S, torch.tensor([1]).to_sparse()), {}, TypeError, ["positions", "sparse"]),
        ((S, S, np.array([2**64 - 1], np.uint64)), {}, ValueError, ["positions", "-1"]),
        ((S, S, [6] * 1000), {}, ValueError, ["positions", "(6,)", "got 6"]),
        ((S, nested(S), [0]), {}, TypeError, ["key", "nested"]),
        ((M.to_sparse(), M, [0]), {}, TypeError, ["query", "sparse"]),
        ((M, M, [(0, 0)]), {"window_size": 2, "bias": torch.zeros(4, 3, 3).to_mkldnn()}, TypeError,
         ["bias", "mkldnn"]),
        ((S, S, [0]), {"scale": 10**400}, ValueError, ["scale", "100000"]),
        ((S, M, [0]), {}, ValueError, ["key", "(2, 6, 8, 4, 8)"]),
        ((S, torch.zeros(2, 6, 3, 8), [0]), {}, ValueError, ["key", "heads"]),
        ((S, S, [0]), {"shift": 1}, ValueError, ["shift needs a window_size", "1"]),
        ((S, S, [0]), {"kernel_size": 7}, ValueError, ["kernel_size", "width 6"]),
        ((S, S, [0]), {"kernel_size": 3, "stride": 4}, ValueError, ["stride", "4 > 3"]),
        ((S, S, [0]), {"is_causal": True}, ValueError, ["is_causal needs a kernel_size", "True"]),
        ((S, S, [0]), {"bias": torch.zeros(2, 5, 5)}, ValueError, ["bias", "window_size"]),
        ((S, S, [0]), {"score": "cosine"}, ValueError, ["score", "cosine"]),
        ((M, M, [(0, 0)]), {"kernel_size": 3, "window_size": 2}, ValueError, ["window_size", "kernel_size"]),
        ((M, M, [(0, 0)]), {"window_size": 2, "dilation": 2}, ValueError, ["dilation needs a kernel_size", "2"]),
        ((S, S, [0]), {"dilation": [1, 2]}, ValueError, ["dilation needs a kernel_size", "[1, 2]"]),
        ((M, M, [(0, 0)]), {"kernel_size": 7}, ValueError, ["kernel_size", "7"]),
        ((M, M, [(0, 0)]), {"window_size": 7}, ValueError, ["window_size", "7"]),
        ((M, M, [(0, 0)]), {"kernel_size": 3, "bias": torch.zeros(4, 3, 3)}, ValueError, ["bias", "(4, 5, 5)"]),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, options, exception, pieces):
    with pytest.raises(exception) as caught:
        natten_ext.attention_weights(*arguments, **options)
    for piece in pieces:
        assert piece in str(caught.value)


def test_memory_is_that_of_the_chosen_queries():
    """Scores of all 65,536 queries over their keys would be a hundred times the result; count what is allocated."""
    query = torch.randn(1, 256, 256, 2, 4)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        natten_ext.attention_weights(query, query, [(0, 0), (100, 200)], kernel_size=7, dilation=[1, 32])
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert taken < 16 * 2 * 2 * 256 * 256 * 4  # sixteen results


def test_shapes_without_data():
    query = torch.empty(2, 6, 6, 2, 8, device="meta")
    assert natten_ext.attention_weights(query, query, [(1, 1)], kernel_size=3).shape == (2, 1, 2, 6, 6)


@pytest.mark.parametrize("options", [{}, {"window_size": 2, "shift": 1}, {"kernel_size": [3, 2], "dilation": [1, 2]}])
def test_compiled_with_a_list_of_positions(options):
    """Without a break in the graph, and each list for itself."""
    torch._dynamo.reset()
    query, key = torch.randn(2, 2, 5, 6, 2, 4).unbind()
    compiled = torch.compile(natten_ext.attention_weights, fullgraph=True, backend="eager")
    for positions in ([(0, 0), (4, 5)], [(1, 2), (3, 3)], [(1, 2)]):
        expected = natten_ext.attention_weights(query, key, torch.tensor(positions), **options)
        torch.testing.assert_close(compiled(query, key, positions, **options), expected)
