"""Gradient checkpointing: blocks whose activations are computed anew in the backward pass instead of being kept.

Source: "Training Deep Nets with Sublinear Memory Cost", Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(model: nn.Module) -> int:
    """Makes every module of `model` recompute whose class has `recompute = True`; returns how many there are.

    Weights, their names and results stay the same, gradients of gradients included; the random numbers of a block
    are drawn again alike.
    """
    blocks = [module for module in model.modules() if getattr(type(module), "recompute", False)]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return len(blocks)
