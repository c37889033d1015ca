"""The three orders by their closed formulas, on dense matrices of all pairs, in plain PyTorch.

Fused kernels compute these formulas, not autograd's graph, so this is "the same computation in plain PyTorch" that
their error is measured against. `terms` sums the absolute values of what the formulas add up, times the
sensitivity of the weights to the rounding of scores: rounding errors are of that size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.operators.cases import Case, Inputs, unshared_arguments_of
from tests.operators.oracle import pair_tables, table_index


def plain_formulas(case: Case, inputs: Inputs, grad_output: Tensor, cotangents: Inputs, dtype: torch.dtype) -> Inputs:
    """All results of `cases.derivatives` at `dtype`, on the CPU; every input has a cotangent."""
    return _formulas(case, inputs, grad_output, cotangents, dtype, absolute=False)


def terms(case: Case, inputs: Inputs, grad_output: Tensor, cotangents: Inputs) -> Inputs:
    """The sums of absolute terms behind each result, in float64."""
    return _formulas(case, inputs, grad_output, cotangents, torch.float64, absolute=True)


def _formulas(
    case: Case, inputs: Inputs, grad_output: Tensor, cotangents: Inputs, dtype: torch.dtype, absolute: bool
) -> Inputs:
    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu().to(dtype)

    def signless(tensor: Tensor | None) -> Tensor | None:
        return tensor.abs() if absolute and tensor is not None else tensor

    def rows(tensor: Tensor) -> Tensor:
        """(batch, *positions, heads, head_dim) to (batch, heads, tokens, head_dim)."""
        return tensor.flatten(1, -3).transpose(1, 2)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2)

    def like(tensor: Tensor, name: str) -> Tensor:
        """Inverse of `rows`, in the shape of an input: the sum of the heads that share it."""
        shape = inputs[name].shape
        return tensor.transpose(1, 2).unflatten(2, (shape[-2], -1)).sum(3).reshape(shape)

    def on_table(pairs: Tensor) -> Tensor:
        """Sum of a (batch, heads, queries, keys) matrix over equal offsets."""
        flat = torch.zeros(case.heads, table[0].numel(), dtype=dtype)
        return flat.scatter_add(1, offsets.flatten(1), pairs.sum(0).flatten(1)).view(table.shape)

    *maps, table = (cast(tensor) for tensor in unshared_arguments_of(case, inputs))
    q, k, v = map(rows, maps)
    l2 = case.score == "l2"
    a = case.effective_scale * (2 if l2 else 1)
    minus = 1 if absolute else -1

    pairs = zip(*(pair_tables(sets, k.shape[2]) for sets in case.neighbors), strict=True)
    allowed, offsets = (torch.stack(tensors, -3) for tensors in pairs)
    scores = a * (q @ turned(k))
    if l2:
        scores = scores - a / 2 * k.square().sum(-1).unsqueeze(-2)
    if table is not None:
        offsets = table_index(offsets, table)
        scores = scores + table.flatten(1).gather(1, offsets.flatten(1)).view(offsets.shape)
    scores = scores.masked_fill(~allowed, -torch.inf)
    # Fused kernels keep the logarithm of the sum, and so a rounding error of the weights as large as the score.
    logsum = scores.logsumexp(-1, keepdim=True)
    weights = (scores - logsum).exp()
    outer = weights * (1 + scores.abs() + logsum.abs()).masked_fill(~allowed, 0) if absolute else weights
    q, k, v, grad = (signless(tensor) for tensor in (q, k, v, rows(cast(grad_output))))
    output = weights @ v

    def gradients(pairs: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of query and key whose scores have the gradient `pairs`."""
        to_key = turned(pairs) @ query
        if l2:
            to_key = to_key + minus * key * pairs.sum(-2).unsqueeze(-1)
        return a * (pairs @ key), a * to_key

    d_weights = grad @ turned(v)
    mean = (grad * output).sum(-1, keepdim=True)
    centred = d_weights + minus * mean
    d_scores = outer * centred
    d_query, d_key = gradients(d_scores, q, k)

    cot_q, cot_k, cot_v, cot_bias = (signless(cast(tensor)) for tensor in unshared_arguments_of(case, cotangents))
    cot_q, cot_k, cot_v = rows(cot_q), rows(cot_k), rows(cot_v)
    x = a * (cot_q @ turned(k) + q @ turned(cot_k))
    if l2:
        x = x + minus * a * (cot_k * k).sum(-1).unsqueeze(-2)
    if table is not None:
        x = x + cot_bias.flatten(1).gather(1, offsets.flatten(1)).view(offsets.shape)
    x = x.masked_fill(~allowed, 0)
    r = (weights * x).sum(-1, keepdim=True)
    w = weights @ cot_v
    t = (weights * x * d_weights).sum(-1, keepdim=True) + minus * 2 * mean * r + (grad * w).sum(-1, keepdim=True)
    dd_scores = outer * (x * centred + minus * r * d_weights + grad @ turned(cot_v) + minus * t)
    dd_query, dd_key = gradients(dd_scores, q, k)
    more_query, more_key = gradients(d_scores, cot_q, cot_k)

    by_argument = {
        "d_": {"query": d_query, "key": d_key, "value": turned(outer) @ grad},
        "dd_": {
            "query": dd_query + more_query,
            "key": dd_key + more_key,
            "value": turned(outer * (x + minus * r)) @ grad,
        },
    }
    results = {"output": like(outer @ v, "query")}
    for prefix, grads in by_argument.items():
        for name in case.tied:
            grads["query"] = grads["query"] + grads.pop(name)
        results |= {prefix + name: like(tensor, name) for name, tensor in grads.items()}
    results["dd_grad_output"] = like((outer * x) @ v + minus * r * (outer @ v) + outer @ cot_v, "query")
    if table is not None:
        results |= {"d_bias": on_table(d_scores), "dd_bias": on_table(dd_scores)}
    return results
