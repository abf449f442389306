"""Formulas of the expert_parallel benchmark against messages that are written down one by one."""

import itertools
import random

import pytest

from benchmarks.expert_parallel.rows import REFERENCE, Shape, Variant, count_rows, expected_rows, payload_row_bytes

EXPERTS, TOKENS = 16, 400
SHAPE = Shape(TOKENS, 8, 4, EXPERTS, 3, 1, 0, 2, 0.0, ("flat", "unique", "two_level"), (1, 2), ("model",))


def draw(rank: int, top_k: int) -> list[list[int]]:
    generator = random.Random(rank)
    return [generator.sample(range(EXPERTS), top_k) for _ in range(TOKENS)]


def messages(dispatch: str, experts: list[int], sender: int, ranks: int, node_size: int) -> set[tuple] | list[tuple]:
    """Every row that one token's way takes, as (from, to, ...), rows that stay included."""
    homes = [expert // (EXPERTS // ranks) for expert in experts]
    if dispatch == "flat":
        return [(sender, home) for home in homes]
    if dispatch == "unique":
        return {(sender, home) for home in homes}
    way = set()
    for home in homes:
        relay = home // node_size * node_size + sender % node_size
        way |= {(sender, relay), (relay, home)}
    return way


@pytest.mark.parametrize("dispatch", ["flat", "unique", "two_level"])
@pytest.mark.parametrize("ranks", [4, 8, 16])
@pytest.mark.parametrize("top_k", [1, 3, 16])
def test_rows_of_a_routing(dispatch, ranks, top_k):
    size = SHAPE.node_size(ranks)
    assert size == ranks // 2
    for rank in range(ranks):
        across = within = 0
        for experts in draw(rank, top_k):
            for sender, receiver in messages(dispatch, experts, rank, ranks, size):
                if sender != receiver:
                    across += sender // size != receiver // size
                    within += sender // size == receiver // size
        assert count_rows(draw(rank, top_k), rank, SHAPE, ranks)[dispatch] == (across, within)


@pytest.mark.parametrize(
    ("dispatch", "ranks"),
    [
        (name, ranks)
        for name in ("flat", "unique", "two_level")
        for ranks in (2, 4, 8)
        if (name, ranks) != ("two_level", 2)
    ],
)
def test_rows_of_uniform_routing(dispatch, ranks):
    drawn = sum(sum(count_rows(draw(rank, SHAPE.top_k), rank, SHAPE, ranks)[dispatch]) for rank in range(ranks))
    # 800 and more tokens of 3 draws each: the sum's standard deviation is below 1.5%.
    assert drawn == pytest.approx(expected_rows(dispatch, SHAPE, ranks), rel=0.05)


def test_variants():
    assert SHAPE.variants_on(1) == [REFERENCE]
    names = {variant.dispatch for variant in SHAPE.variants_on(2)}
    assert names == {"flat", "unique"}  # two nodes of one rank each
    assert count_rows([[0, 8]], 0, SHAPE, 2)["flat"] == (1, 0)
    four = SHAPE.variants_on(4)
    assert four[0] == REFERENCE and len(four) == len(set(four)) == 6
    assert {(variant.dispatch, variant.chunks) for variant in four} == set(itertools.product(SHAPE.dispatch, (1, 2)))
    sizes = {name: payload_row_bytes(Variant("flat", 1, name), SHAPE) for name in ("model", "bf16", "fp8")}
    assert sizes == {"model": 32, "bf16": 16, "fp8": 12}
