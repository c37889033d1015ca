"""Run by test_bench_memory in the memory worker's environment: attentions whose memory is known, as JSON.

``scratch`` allocates SCRATCH bytes on top and frees them; ``keeps`` saves SCRATCH bytes for the backward; ``frees``
needs them in its forward alone; ``nothing`` returns its query's values and allocates nothing else.
"""

import json
from dataclasses import replace
from functools import partial

import torch

from benchmarks.memory import ResidentSet, measure
from benchmarks.problem import STEPS, make_inputs
from benchmarks.shapes import SHAPES

SCRATCH = 48 << 20


class Keeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        ctx.saved = torch.ones(SCRATCH // 4)
        return query + 0

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad, 3 * grad, 4 * grad


class Frees(Keeps):
    @staticmethod
    def forward(ctx, query, key, value):
        held = torch.ones(SCRATCH // 4)
        output = query + 0
        del held
        return output


def nothing(query, key, value, table):
    return query * 1


def scratch(query, key, value, table):
    held = torch.ones(SCRATCH // 4)
    output = query * 1
    del held
    return output


def keeps(query, key, value, table):
    return Keeps.apply(query, key, value)


def frees(query, key, value, table):
    return Frees.apply(query, key, value)


def main():
    torch.set_num_threads(1)
    shape = replace(SHAPES["seq-1025"], batch=4)
    inputs = make_inputs(shape, torch.float32, torch.device("cpu"))
    tiny = make_inputs(shape.tiny(), torch.float32, torch.device("cpu"))
    cases = {"nothing": (nothing, "forward"), "scratch": (scratch, "forward"), "keeps": (keeps, "backward")}
    cases |= {"frees": (frees, "backward"), "nothing again": (nothing, "forward")}
    answers = {}
    for name, (attend, order) in cases.items():
        warm_up = partial(STEPS[order], lambda *tensors: sum(tensors[:3]), tiny)
        answers[name] = measure(attend, inputs, order, ResidentSet(), warm_up)
    print(json.dumps({"size": inputs.query.nbytes} | {name: answer.to_dict() for name, answer in answers.items()}))


if __name__ == "__main__":
    main()
