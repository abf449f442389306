"""The long_context benchmark's rows: documents, claims, and one small measurement."""

import math

import pytest

from benchmarks.long_context.documents import zipf_starts
from benchmarks.long_context.recompute import RecomputeRow, recompute_claims
from benchmarks.long_context.rows import (
    DOCUMENTS,
    KINDS,
    LEAST_SHARED,
    MASKED,
    SHARED,
    STEPPED,
    Point,
    claims_of,
    measure_points,
    measure_shared,
)
from benchmarks.long_context.step import NARROW, WIDE, make_step, measure
from moe_train.distributed.context import ContextRanks
from moe_train.distributed.mesh import create_mesh
from moe_train.model.block import Recompute
from tests.ranks import RankPool


def test_documents_fill_the_row() -> None:
    starts = zipf_starts(4096, seed=0)
    assert starts[0] == 0 and starts[-1] == 4096 and list(starts) == sorted(set(starts))
    assert zipf_starts(4096, seed=0) == starts != zipf_starts(4096, seed=1)


def test_claims_follow_the_bytes() -> None:
    def points(power: float, masked: int) -> list[Point]:
        names = [kind.name for kind in (*KINDS, STEPPED)]
        found = [Point(name, s, int(s**power), 1.0) for name in names for s in (1024, 4096, 16_384)]
        return [*found, Point(MASKED.name, 16_384, masked, 1.0)]

    assert all(claim["holds"] for claim in claims_of(points(1.0, 16_384 * 5), 1.3))
    assert [claim["holds"] for claim in claims_of(points(1.2, 16_384), 1.4)] == [False] * 6


def test_claims_of_recomputation() -> None:
    def rows(block: int, seconds: float, experts: int = 70) -> list[RecomputeRow]:
        found = [("none", 100, 1.0), ("attention", 80, 1.1), ("experts", experts, 1.1), ("block", block, seconds)]
        return [RecomputeRow(*each) for each in found]

    assert all(claim["holds"] for claim in recompute_claims(rows(30, 1.4)))
    assert [claim["holds"] for claim in recompute_claims(rows(40, 1.4))] == [False, True]
    assert [claim["holds"] for claim in recompute_claims(rows(30, 1.6))] == [False, True]
    assert [claim["holds"] for claim in recompute_claims(rows(30, 1.4, experts=101))] == [True, False]


def test_ranks_must_share_the_memory_too() -> None:
    def claim(two: int, four: int) -> bool:
        points = [Point(SHARED[ranks].name, 4096, held, 1.0) for ranks, held in ((1, 1000), (2, two), (4, four))]
        (found,) = [each for each in claims_of(points, 1.0) if "each of 2 ranks" in each["claim"]]
        return bool(found["holds"])

    assert claim(500, 300) and not claim(700, 300) and not claim(500, 400)


def peak_of_step(rank: int, world_size: int, length: int) -> int:
    """Most bytes of a rank in a recomputed step on a row with documents, which the ranks share."""
    context = None
    if world_size > 1:
        group = create_mesh(1, 60, context_size=world_size).context
        context = ContextRanks(group.group, group.rank, group.size)
    return measure(make_step(WIDE, length, zipf_starts(length, 0), 0, context, Recompute("block")))[0]


def test_ranks_that_share_a_row_keep_less(pool1: RankPool, pool2: RankPool) -> None:
    (alone,) = pool1.run(peak_of_step, 4096, timeout=100)
    assert alone >= LEAST_SHARED * max(pool2.run(peak_of_step, 4096, timeout=100))


def test_memory_of_a_step_is_linear_in_the_length() -> None:
    short, long = (measure(make_step(NARROW, length, zipf_starts(length, 0), 0))[0] for length in (4096, 8192))
    assert math.log2(long / short) <= 1.1


@pytest.mark.slow  # seven interpreters
def test_all_numbers_of_ranks_are_measured() -> None:
    points = measure_shared([2048], seed=0)
    assert [point.kind for point in points] == [kind.name for kind in SHARED.values()]
    assert points[0].peak_bytes > points[1].peak_bytes > points[2].peak_bytes and all(p.cpu_seconds > 0 for p in points)


def test_a_mask_takes_more() -> None:
    found = {(point.kind, point.length): point.peak_bytes for point in measure_points([512], seed=0)}
    assert set(found) == {(kind.name, 512) for kind in (*KINDS, MASKED, STEPPED)}
    assert found[MASKED.name, 512] > 512 * 512 and found[MASKED.name, 512] > found[DOCUMENTS.name, 512]
