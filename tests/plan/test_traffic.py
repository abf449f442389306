"""Expected bytes of every dispatch against the formulas and counts of rows of the dispatch benchmark."""

import random

import pytest

from benchmarks.expert_parallel.rows import Shape, count_rows, expected_rows
from moe_train.plan.layout import RankGroup
from moe_train.plan.traffic import Reduction, layer_traffic
from tests.plan.cases import planned

T, D, E, K = 4096, 2048, 64, 8


def shape(nodes: int) -> Shape:
    return Shape(T, D, 1024, E, K, 1, 0, nodes, 0.0, ("flat", "unique", "two_level"), (1,), ("model",))


@pytest.mark.parametrize("dispatch", ["flat", "unique", "two_level"])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_rows_are_those_of_the_formula(dispatch: str, size: int) -> None:
    plan = planned(parallel__expert_parallel_size=size, parallel__dispatch=dispatch, parallel__zero_stage=1)
    sent = layer_traffic(plan.shape, plan.layout, plan.loads).forward.total
    nodes = max(1, size // 8)
    wanted = "unique" if dispatch == "two_level" and nodes == 1 else dispatch
    rows = expected_rows(wanted, shape(nodes), size) / size * 2 * D * 2  # there and back, bf16
    metadata = sent - rows
    assert 0 <= metadata < 0.01 * rows


@pytest.mark.parametrize(("dispatch", "place"), [("flat", 0), ("unique", 1), ("two_level", 2)])
def test_rows_across_and_inside_of_nodes_are_those_that_draws_need(dispatch: str, place: int) -> None:
    draws = random.Random(3)
    chosen = [draws.sample(range(E), K) for _ in range(T)]
    across, within = count_rows(chosen, 5, shape(2), 16)[dispatch]
    plan = planned(parallel__expert_parallel_size=16, parallel__dispatch=dispatch, parallel__zero_stage=1)
    backward = layer_traffic(plan.shape, plan.layout, plan.loads).backward
    assert backward.inter_node == pytest.approx(across * 2 * D * 2, rel=0.02)
    assert backward.intra_node == pytest.approx(within * 2 * D * 2, rel=0.02)


def test_fewer_bytes_across_nodes_the_more_a_row_serves() -> None:
    across = [
        planned(parallel__expert_parallel_size=32, parallel__dispatch=name)
        .traffic.parts["all_to_all_forward"]
        .inter_node
        for name in ("flat", "unique", "two_level")
    ]
    assert across == sorted(across, reverse=True) and across[2] < across[1] / 2


def test_payload_and_recomputation() -> None:
    plain = planned(parallel__expert_parallel_size=8).traffic.parts
    narrow = planned(parallel__expert_parallel_size=8, parallel__payload="fp8").traffic.parts
    again = planned(parallel__expert_parallel_size=8, train__recompute="block").traffic.parts
    assert narrow["all_to_all_backward"].total == pytest.approx(plain["all_to_all_backward"].total / 2, rel=0.01)
    assert again["all_to_all_forward"].total == pytest.approx(2 * plain["all_to_all_forward"].total)


@pytest.mark.parametrize(
    ("part", "every", "times"), [("attention", 1, 1.0), ("experts", 1, 2.0), ("experts", 4, 1.25), ("block", 2, 1.5)]
)
def test_rows_travel_again_where_experts_are_recomputed(part: str, every: int, times: float) -> None:
    plain = planned(parallel__expert_parallel_size=8)
    changes = {"train__recompute": part, "train__recompute_every": every}
    again = planned(parallel__expert_parallel_size=8, **changes)
    assert again.traffic.parts["all_to_all_forward"].total == pytest.approx(
        times * plain.traffic.parts["all_to_all_forward"].total
    )
    assert again.traffic.parts["all_to_all_backward"] == plain.traffic.parts["all_to_all_backward"]
    if part == "attention":
        assert again.step.terms["all_to_all"] == pytest.approx(plain.step.terms["all_to_all"])
    else:
        assert again.step.terms["all_to_all"] > plain.step.terms["all_to_all"]


def test_rings_pass_each_byte_across_nodes_once_for_the_ranks_of_a_node() -> None:
    alone = Reduction("all_reduce", RankGroup(1, 1), 1e9, 1)
    inside = Reduction("all_reduce", RankGroup(8, 8), 8e9, 1)
    across = Reduction("all_gather", RankGroup(16, 4), 16e9, 1)
    assert alone.sent.total == 0
    assert (inside.sent.intra_node, inside.sent.inter_node) == (14e9, 0)
    assert across.sent.total == pytest.approx(15e9) and across.sent.inter_node == pytest.approx(15e9 / 4)


def test_stage_two_reduces_after_every_pass() -> None:
    once = planned(parallel__zero_stage=1).traffic.parts["gradient_reduction"].total
    often = planned(parallel__zero_stage=2)
    assert often.layout.accumulation == 4
    assert often.traffic.parts["gradient_reduction"].total == pytest.approx(4 * once)


def test_keys_and_values_of_shared_sequences() -> None:
    size, accumulation = 4, 2
    changes = {"parallel__context_parallel_size": size, "train__micro_batch_size": 16}
    plan, ring = (planned(**changes, parallel__context_exchange=way) for way in ("all_gather", "ring"))
    assert plan.layout.accumulation == accumulation and plan.layout.tokens == 16 * 2048 // size
    keys = 2 * 4 * 128 * plan.layout.tokens  # 2 G d elements of a token
    once = accumulation * plan.shape.config.num_layers
    there = 2 * (size - 1) * keys * 2  # in both passes, bf16
    assert plan.traffic.parts["key_value_exchange"].total == once * (there + (size - 1) * keys * 4)
    assert ring.traffic.parts["key_value_exchange"].total == once * (there + size * keys * 4)  # gradients go home
    assert plan.traffic.parts["key_value_exchange"].inter_node == 0  # eight ranks a node
    again = planned(**changes, train__recompute="block").traffic.parts["key_value_exchange"].total
    assert again == plan.traffic.parts["key_value_exchange"].total + once * (size - 1) * keys * 2
    experts = planned(**changes, train__recompute="experts").traffic.parts["key_value_exchange"]
    assert experts == plan.traffic.parts["key_value_exchange"]
    assert ring.step.terms["key_value_exchange"] < plan.step.terms["key_value_exchange"]  # hidden behind blocks
    alone = planned(train__micro_batch_size=16 // size)
    assert alone.traffic.parts["key_value_exchange"].total == alone.step.terms["key_value_exchange"] == 0
    assert alone.layout.tokens == plan.layout.tokens
