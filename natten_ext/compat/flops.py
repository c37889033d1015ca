"""Multiply-adds of attention for fvcore's ``FlopCountAnalysis``, under NATTEN's names.

They are those of the two products, queries by keys and weights by values. NATTEN counts one or two more for every
score, where it adds a table.
"""

from __future__ import annotations

import math
from typing import Any

from ..geometry import decode
from ..operators import OPERATORS


def qk_2d_rpb_flop(inputs: list[Any], outputs: list[Any]) -> int:
    """Of the unfused scores, whatever the number of map axes."""
    return math.prod(_shape(inputs[0])) * _shape(outputs[0])[-1]


def av_2d_flop(inputs: list[Any], outputs: list[Any]) -> int:
    """Of the unfused weighted sums, whatever the number of map axes."""
    return math.prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


qk_rpb_flop = qk_1d_rpb_flop = qk_3d_rpb_flop = qk_2d_rpb_flop
av_flop = av_1d_flop = av_3d_flop = av_2d_flop


def fna_generic_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Of fused attention."""
    query, value, code = _shape(inputs[0]), _shape(inputs[2]), inputs[4]
    batch, *extents, heads, head_dim = query
    tokens = math.prod(extents)
    neighborhood = decode([entry.toIValue() for entry in code.node().inputs()] or code.toIValue(), len(extents))
    return batch * heads * tokens * neighborhood.keys(tokens) * (head_dim + value[-1])


def add_natten_handle(flop_ctr: Any) -> Any:
    """The counter (fvcore's), which counts this package's attention from here on."""
    handles = {"prim::PythonOp.Scores": qk_2d_rpb_flop, "prim::PythonOp.Gather": av_2d_flop}
    handles |= {f"{operators.name}::forward": fna_generic_flops for operators in OPERATORS.values()}
    return flop_ctr.set_op_handle(**handles)


def get_flops(model: Any, input: Any, disable_warnings: bool = False) -> int:
    """Multiply-adds of a call of the model, as fvcore counts them."""
    from fvcore.nn import FlopCountAnalysis

    counter = add_natten_handle(FlopCountAnalysis(model, input))
    return counter.unsupported_ops_warnings(not disable_warnings).total()


def _shape(value: Any) -> list[int]:
    """Of a tensor in a trace."""
    from fvcore.nn.jit_handles import get_shape

    return get_shape(value)
