"""The long_context benchmark's rows: documents, claims, and one small measurement."""

from benchmarks.long_context.recompute import RecomputeRow, recompute_claims
from benchmarks.long_context.rows import (
    DOCUMENTS,
    KINDS,
    MASKED,
    STEPPED,
    Point,
    claims_of,
    measure_points,
    zipf_starts,
)


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


def test_a_mask_takes_more() -> None:
    found = {(point.kind, point.length): point.peak_bytes for point in measure_points([512], seed=0)}
    assert set(found) == {(kind.name, 512) for kind in (*KINDS, MASKED, STEPPED)}
    assert found[MASKED.name, 512] > 512 * 512 and found[MASKED.name, 512] > found[DOCUMENTS.name, 512]
