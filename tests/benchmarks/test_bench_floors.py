"""Counted work against brute force, and the arithmetic of the floors."""

import itertools
from dataclasses import replace

import pytest
import torch

from benchmarks.floors import Rates, measure_rates, stage_work, step_floor, step_fmas
from benchmarks.layout import neighborhood_index
from benchmarks.shapes import NAMED


def small(name, **changes):
    return replace(NAMED[name], **{"batch": 2, "heads": 2, "head_dim": 3, **changes})


SMALL = {
    "grid": small("church-g4", size=(8, 8), window=4),
    "neighborhood": small("nat-16", size=(14, 14)),
    "volume": small("hunyuan-gna", size=(4, 5, 6), window=(3, 2, 4), stride=(3, 1, 2), causal=(False, True, False)),
    "shifted": small("video-swin-t1", size=(3, 5, 4), window=(2, 3, 4), shift=(1, 0, 2)),
    "full": small("seq-65", size=(5,)),
    "cross": small("cross-256", size=(6,), keys=4),
}


def pairs(shape):
    """Every (batch, head, query, key) that attends, by listing them."""
    tokens = list(itertools.product(*map(range, shape.size)))
    for _, head in itertools.product(range(shape.batch), range(shape.heads)):
        if shape.kind == "full":
            yield from itertools.product(range(shape.queries), range(shape.key_tokens))
        elif shape.kind == "grid":
            same = [
                (q, k)
                for q in tokens
                for k in tokens
                if all(
                    (a - first) // window == (b - first) // window
                    for a, b, window, first in zip(q, k, shape.kernel, shape.neighborhood.first, strict=True)
                )
            ]
            yield from same
        else:
            keys, _, exists = neighborhood_index(shape, head)
            yield from (
                (q, int(k)) for q, (row, there) in enumerate(zip(keys, exists, strict=True)) for k in row[there]
            )


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize(("stage", "products"), [("forward", 2), ("backward", 5), ("double", 12)])
def test_work_is_what_listing_the_pairs_counts(kind, stage, products):
    shape = SMALL[kind]
    count = sum(1 for _ in pairs(shape))
    work = stage_work(shape, stage, 4)
    assert work.exps == count
    assert work.fmas == products * count * shape.head_dim


def test_bytes_are_those_of_the_tensors():
    shape = SMALL["cross"]
    query, key = torch.empty(shape.query_shape), torch.empty(shape.key_shape)
    statistic = query[..., 0].numel() * 4
    forward = 2 * query.nbytes + 2 * key.nbytes + statistic
    assert stage_work(shape, "forward", 4).bytes == forward
    # q o dO dq, k v dk dv
    assert stage_work(shape, "backward", 4).bytes == 4 * query.nbytes + 4 * key.nbytes + statistic
    # q o dO gq, q_bar dO_bar; k v gk gv, k_bar v_bar
    assert stage_work(shape, "double", 4).bytes == 6 * query.nbytes + 6 * key.nbytes + statistic


def test_a_table_adds_its_size():
    shape = SMALL["grid"]
    table = torch.empty(shape.table_shape)
    for stage, accesses in (("forward", 1), ("backward", 2), ("double", 2)):
        without = stage_work(replace(shape, table=False), stage, 4).bytes
        assert stage_work(shape, stage, 4).bytes - without == accesses * table.nbytes


def test_floors_of_the_large_maps_are_those_of_the_design():
    """nat-256 to nat-1024 in bf16, per image, at 3.35 TB/s: 20/40/60, 40/80/120 and 80/160/240 us."""
    for name, forward in (("nat-256", 20e-6), ("nat-512", 40e-6), ("nat-1024", 80e-6)):
        shape = replace(NAMED[name], batch=1)
        for stage, factor in (("forward", 1), ("backward", 2), ("double", 3)):
            seconds = stage_work(shape, stage, 2).bytes / 3.35e12
            # The statistics per query, which that table leaves out, add up to a quarter at head_dim 8.
            assert seconds == pytest.approx(factor * forward, rel=0.3)


def test_step_floor_adds_up_the_stages_and_takes_the_largest_bound():
    shape = SMALL["full"]
    slow_exps = Rates(fmas=1e30, exps=1.0, bytes=1e30)
    assert step_floor(shape, "double", 4, slow_exps) == (
        pytest.approx(3 * stage_work(shape, "forward", 4).exps),
        "exps",
    )
    slow_fmas = Rates(fmas=1.0, exps=1e30, bytes=1e30)
    for order in ("forward", "backward", "double"):
        assert step_floor(shape, order, 4, slow_fmas) == (pytest.approx(step_fmas(shape, order)), "fmas")
    slow_copy = Rates(fmas=1e30, exps=1e30, bytes=2.0)
    total = sum(stage_work(shape, stage, 4).bytes for stage in ("forward", "backward"))
    assert step_floor(shape, "backward", 4, slow_copy) == (pytest.approx(total / 2), "bytes")


def test_rates_are_measured():
    rates = measure_rates(torch.device("cpu"), torch.float32, samples=1)
    # Any machine of this century: between a million and a million billion.
    assert all(1e6 < rate < 1e15 for rate in rates.to_dict().values())
