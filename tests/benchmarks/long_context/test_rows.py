"""The long_context benchmark's rows: documents, claims, and one small measurement."""

from benchmarks.long_context.documents import zipf_starts
from benchmarks.long_context.rows import (
    DOCUMENTS,
    KINDS,
    MASKED,
    SHARED,
    STEPPED,
    Point,
    claims_of,
    measure_points,
    measure_shared,
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


def test_ranks_must_share_the_memory_too() -> None:
    def claim(two: int, four: int) -> bool:
        points = [Point(SHARED[ranks].name, 4096, held, 1.0) for ranks, held in ((1, 1000), (2, two), (4, four))]
        (found,) = [each for each in claims_of(points, 1.0) if "each of 2 ranks" in each["claim"]]
        return bool(found["holds"])

    assert claim(500, 300) and not claim(700, 300) and not claim(500, 400)


def test_ranks_that_share_a_row_keep_less() -> None:
    """Bytes, not time: of a recomputed step with documents, each of two ranks keeps 1.6 times less than one rank."""
    points = measure_shared([4096], rounds=1, seed=0)
    assert [point.kind for point in points] == [kind.name for kind in SHARED.values()]
    (sharing,) = [each for each in claims_of(points, 1.0) if "each of 2 ranks" in each["claim"]]
    assert sharing["holds"], sharing


def test_memory_of_a_step_is_linear_in_the_length() -> None:
    points = [point for point in measure_points([4096, 8192, 16_384], seed=0) if point.kind == STEPPED.name]
    assert exponent(points, STEPPED) <= 1.1


def test_a_mask_takes_more() -> None:
    found = {(point.kind, point.length): point.peak_bytes for point in measure_points([512], seed=0)}
    assert set(found) == {(kind.name, 512) for kind in (*KINDS, MASKED, STEPPED)}
    assert found[MASKED.name, 512] > 512 * 512 and found[MASKED.name, 512] > found[DOCUMENTS.name, 512]
