"""Attention from other libraries, each fitted to our layout in the best way it offers.

- SDPA gets windows as batch entries and the table as a dense float mask; neighborhoods as a dense mask over the map;
  L2 scores as heads with one more channel, ``[2q, -1]`` against ``[k, |k|^2]``.
- FlexAttention gets the table as a ``score_mod`` and neighborhoods as a block mask (tokens in row-major order).
- NATTEN runs one call per group of heads, on each of its kernels by name, and has had no table since 0.20, so it is
  compared without.
"""

from __future__ import annotations

import functools
import math
import shutil
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .layout import dense_bias, dense_index, from_windows, grid_index, heads_first, heads_last, lookup, to_windows
from .problem import Attend, CannotError
from .shapes import Shape

# Largest dense mask of a neighborhood, and largest score matrix of SDPA's MATH kernel, that are worth trying.
MASK_BYTES = {"cpu": 1 << 29, "cuda": 2 << 30}
MATH_BYTES = 16 << 30


def sdpa_kernels(device_type: str) -> dict[str, functools.partial]:
    """SDPA by kernel: what torch's own choice could fall back from is asked for by name, so that nothing hides."""
    if device_type == "cpu":
        kernels = {"sdpa": SDPBackend.FLASH_ATTENTION}
    else:
        kernels = {
            "sdpa-flash": SDPBackend.FLASH_ATTENTION,
            "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
            "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
        }
    kernels["sdpa-math"] = SDPBackend.MATH
    return {name: functools.partial(prepare_sdpa, kernel) for name, kernel in kernels.items()}


def prepare_sdpa(kernel: SDPBackend, shape: Shape, device: torch.device, dtype: torch.dtype) -> Attend:
    scale = shape.head_dim**-0.5
    if shape.kind == "grid" and shape.general:
        raise CannotError("written for windows that divide a map of two axes")
    if kernel is SDPBackend.MATH and device.type == "cuda":
        batch = shape.batch * shape.windows if shape.kind == "grid" else shape.batch
        _refuse_large(shape, dtype, batch, MATH_BYTES)

    def run(query, key, value, mask=None):
        with warnings.catch_warnings(record=True) as caught, sdpa_kernel([kernel]):
            warnings.simplefilter("always")
            try:
                return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                # One warning per kernel, ending in "because:", then one with the reason.
                why = [str(w.message).split(" (Triggered")[0] for w in caught]
                why = [text for text in why if not text.endswith("because:") and "not used because" not in text]
                what = "a mask that requires a gradient" if mask is not None and mask.requires_grad else "this"
                raise CannotError(f"no such kernel for {what}{': ' * bool(why)}{'; '.join(why)}") from error

    if shape.kind == "full":
        augment = _augment_l2 if shape.score == "l2" else None

        def attend(query, key, value, table):
            query, key, value = map(heads_first, (query, key, value))
            if augment:
                query, key, value = augment(query, key, value)
            return heads_last(run(query, key, value)[..., : shape.head_dim], shape)

    elif shape.kind == "grid":
        places = grid_index(shape.kernel).to(device)

        def attend(query, key, value, table):
            query, key, value = (to_windows(x, shape.kernel) for x in (query, key, value))
            mask = None if table is None else lookup(table, places)[None]
            return from_windows(run(query, key, value, mask), shape)

    else:
        _refuse_large(shape, dtype, 1, MASK_BYTES[device.type])
        places, masked = dense_index(shape, device)
        masked = masked.repeat_interleave(shape.heads // len(masked), 0)
        no_table = torch.zeros((), dtype=dtype, device=device).expand(masked.shape)

        def attend(query, key, value, table):
            query, key, value = map(heads_first, (query, key, value))
            mask = no_table if table is None else dense_bias(shape, table, places)
            return heads_last(run(query, key, value, mask.masked_fill(masked, -math.inf)[None]), shape)

    return attend


def _refuse_large(shape: Shape, dtype: torch.dtype, batch: int, limit: int) -> None:
    keys = shape.keys_per_query if shape.kind == "grid" else shape.key_tokens
    queries = keys if shape.kind == "grid" else shape.queries
    size = batch * shape.heads * queries * keys * dtype.itemsize
    if size > limit:
        raise CannotError(
            f"a dense {queries} x {keys} matrix per head takes {size / 2**30:.1f} GiB (limit {limit / 2**30:g})"
        )


def _augment_l2(query, key, value):
    """-|q-k|^2 without its row constant as one product: ``[2q, -1] . [k, |k|^2]``; values get a channel of zeros."""
    query = torch.cat([2 * query, -torch.ones_like(query[..., :1])], -1)
    key = torch.cat([key, key.square().sum(-1, keepdim=True)], -1)
    return query, key, F.pad(value, (0, 1))


def prepare_flex(shape: Shape, device: torch.device, dtype: torch.dtype) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise CannotError("torch.compile finds no C++ compiler")
    if shape.general:
        raise CannotError("written for whole windows, and windows that slide, on two map axes")
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    scale = shape.head_dim**-0.5

    if shape.kind == "full":

        def attend(query, key, value, table):
            query, key, value = (heads_first(x).contiguous() for x in (query, key, value))
            if shape.score == "dot":
                return heads_last(compiled(query, key, value, scale=scale), shape)
            key_bias = -scale * key.square().sum(-1)

            def add_norm(score, b, h, q, k):
                return score + key_bias[b, h, k]

            return heads_last(compiled(query, key, value, score_mod=add_norm, scale=2 * scale), shape)

        return attend

    window = shape.window
    if shape.kind == "grid":

        def attend(query, key, value, table):
            query, key, value = (to_windows(x, shape.kernel) for x in (query, key, value))

            def add_table(score, b, h, q, k):
                return score + table[h, k // window - q // window + window - 1, k % window - q % window + window - 1]

            mod = None if table is None else add_table
            return from_windows(compiled(query, key, value, score_mod=mod, scale=scale), shape)

        return attend

    height, width = shape.size
    per_head = [d for d in shape.dilations for _ in range(shape.heads // len(shape.dilations))]
    dilation = torch.tensor(per_head, device=device)

    def in_axis(q, k, length, step):
        class_length = (length - q % step + step - 1) // step
        start = torch.clamp(q // step - window // 2, min=0)
        start = torch.minimum(start, class_length - window)
        return (q % step == k % step) & (k // step >= start) & (k // step < start + window)

    def in_neighborhood(b, h, q, k):
        step = dilation[h]
        return in_axis(q // width, k // width, height, step) & in_axis(q % width, k % width, width, step)

    tokens = shape.queries
    if device.type == "cpu" and tokens**2 * shape.heads > MASK_BYTES["cpu"]:
        raise CannotError(f"building its block mask evaluates {tokens} x {tokens} pairs per head")
    # Compiled on a GPU, where the uncompiled way holds all pairs in memory.
    block_mask = create_block_mask(
        in_neighborhood, None, shape.heads, tokens, tokens, device=device, _compile=device.type == "cuda"
    )

    def attend(query, key, value, table):
        query, key, value = (heads_first(x).contiguous() for x in (query, key, value))

        def add_table(score, b, h, q, k):
            step = dilation[h]
            dy = torch.clamp((k // width - q // width) // step, -window + 1, window - 1)
            dx = torch.clamp((k % width - q % width) // step, -window + 1, window - 1)
            return score + table[h, dy + window - 1, dx + window - 1]

        mod = None if table is None else add_table
        output = compiled(query, key, value, score_mod=mod, block_mask=block_mask, scale=scale)
        return heads_last(output, shape)

    return attend


# Names of NATTEN's kernels for neighborhoods; those that the device can't run raise when they are run.
NATTEN_KERNELS = ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna")


def natten_kernels(device_type: str) -> dict[str, functools.partial]:
    """NATTEN by kernel on a GPU; its own choice elsewhere."""
    if device_type != "cuda":
        return {"natten": functools.partial(prepare_natten, None)}
    return {f"natten-{name.split('-')[0]}": functools.partial(prepare_natten, name) for name in NATTEN_KERNELS}


def prepare_natten(kernel: str | None, shape: Shape, device: torch.device, dtype: torch.dtype) -> Attend:
    try:
        import natten
    except ImportError as error:
        raise CannotError("not installed") from error
    if shape.kind != "neighborhood":
        raise CannotError(
            f"no {shape.kind} attention with this score" if shape.score != "dot" else "not a neighborhood"
        )
    function = f"na{len(shape.size)}d"
    if not hasattr(natten, function):
        raise CannotError(f"version {natten.__version__} has no {function}; 0.20 or later is needed")

    choices = {"kernel_size": shape.window, "stride": shape.stride, "is_causal": shape.causal, "backend": kernel}

    def attend(query, key, value, table):
        parts = [
            getattr(natten, function)(
                *(x[..., heads, :].contiguous() for x in (query, key, value)),
                dilation=dilation, scale=shape.head_dim**-0.5, **choices,
            )
            for heads, dilation in shape.head_groups
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    return attend
