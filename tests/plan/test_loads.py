"""Sampled loads: even in the mean, as uneven as asked, and as the seed says."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config.errors import UsageError
from moe_train.plan.loads import draw_shares, row_loads
from moe_train.plan.memory import plan_memory
from tests.plan.cases import LARGE, planned


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 64), st.floats(0, 3), st.integers(0, 1000))
def test_shares_sum_to_one_and_no_expert_has_more_than_a_kth(experts: int, variation: float, seed: int) -> None:
    top_k = max(1, experts // 4)
    shares = draw_shares(np.random.default_rng(seed), (5, 3), experts, top_k, variation)
    assert shares.sum(-1) == pytest.approx(1, abs=1e-6)
    assert shares.max() <= 1 / top_k + 1e-9 and shares.min() >= 0


def test_shares_vary_as_asked() -> None:
    shares = draw_shares(np.random.default_rng(0), (2000,), 64, 2, 0.5)
    assert np.mean(shares.std(-1) * 64) == pytest.approx(0.5, rel=0.05)


def test_imbalance_slows_the_slowest_rank_and_takes_memory() -> None:
    plans = [planned(parallel__expert_parallel_size=8, imbalance=value) for value in (0.0, 0.3, 0.8)]
    for name in ("p50", "p99", "seconds"):
        times = [getattr(plan.step, name) for plan in plans]
        assert times == sorted(times) and times[0] < times[2]
    assert all(plan.step.p50 <= plan.step.p99 for plan in plans)
    assert plans[0].loads.most_rows < plans[2].loads.most_rows


def test_chance_alone_is_that_of_a_multinomial() -> None:
    plan = planned(parallel__expert_parallel_size=8)
    draws, tokens, ranks = np.random.default_rng(1), plan.layout.tokens * 8, 8
    rows = draws.multinomial(tokens * 8, np.full(ranks, 1 / ranks), size=500)
    wanted = rows.max(1).mean() / rows.mean() - 1
    found = float(np.mean(plan.loads.overload_NL)) - 1
    assert wanted / 2 < found < 2 * wanted  # the slowest of several groups, and draws without replacement


def test_the_seed_decides() -> None:
    plan = planned(parallel__expert_parallel_size=8)
    same, other = (row_loads(plan.shape, plan.layout, 0.5, seed) for seed in (0, 1))
    assert np.array_equal(same.overload_NL, row_loads(plan.shape, plan.layout, 0.5, 0).overload_NL)
    assert not np.array_equal(same.overload_NL, other.overload_NL)


def test_capacity_leaves_what_multinomial_draws_leave() -> None:
    plan = planned(model__moe__capacity_factor=1.0)
    tokens, experts, top_k = plan.layout.sequence_length, 64, 8
    room, draws = math.ceil(tokens * top_k / experts), np.random.default_rng(2)
    counts = draws.binomial(tokens, top_k / experts, size=(200, experts))
    assert plan.loads.kept == pytest.approx(np.minimum(counts, room).mean() / counts.mean(), abs=0.003)
    assert planned(model__moe__capacity_factor=2.0).loads.kept == pytest.approx(1.0, abs=1e-3)


def test_measured_shares_take_the_place_of_draws() -> None:
    plan = planned(parallel__expert_parallel_size=8)
    shares = np.full((plan.shape.num_moe_layers, 64), 0.5 / 56)
    shares[:, :8] = 0.5 / 8  # half of all on the first rank
    loads = row_loads(plan.shape, plan.layout, shares_LE=shares)
    assert float(loads.overload_NL.mean()) == pytest.approx(4.0, rel=0.05)


def test_more_imbalance_is_never_faster_up_to_what_is_possible() -> None:
    most = math.sqrt(64 / 8 - 1)
    values = [0.0, *(most * part for part in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95, 0.999))]
    plans = [planned(parallel__expert_parallel_size=8, imbalance=value) for value in values]
    found = [plan.step.seconds for plan in plans]
    assert found == sorted(found) and found[0] < found[-1]


def test_impossible_imbalance_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"--imbalance \(2\.65\) must be below .* \(2\.65\)"):
        planned(imbalance=2.65)  # sqrt(7) is 2.6458
    with pytest.raises(UsageError, match=r"--imbalance \(0\.1\) has no effect: the model has no MoE layer"):
        dense = {name: value for name, value in LARGE.items() if ".moe." not in name}
        planned(dense, imbalance=0.1, model__moe_every=0)


def test_shares_of_another_model_are_refused() -> None:
    plan = planned()
    with pytest.raises(
        UsageError, match="--loads: is of a run with 3 MoE layers of 32 experts; the model has 16 of 64"
    ):
        row_loads(plan.shape, plan.layout, shares_LE=np.full((3, 32), 1 / 32))


def test_one_busy_layer_counts_for_what_one_block_needs() -> None:
    plan = planned(parallel__expert_parallel_size=8)
    shares = np.full((plan.shape.num_moe_layers, 64), 1 / 64)
    shares[3], shares[3, :8] = 0.5 / 56, 0.5 / 8  # in one layer of 16, half of all on the first rank
    loads = row_loads(plan.shape, plan.layout, shares_LE=shares)
    assert loads.busiest_rows == pytest.approx(4 * loads.mean_rows, rel=0.05)
    assert loads.most_rows == pytest.approx((4 + 15) / 16 * loads.mean_rows, rel=0.05)
    assert loads.busiest_arriving / loads.busiest_rows == pytest.approx(loads.most_arriving / loads.most_rows)


@pytest.mark.parametrize(
    ("recompute", "grows"), [("block", False), ("experts", False), ("attention", True), ("none", True)]
)
def test_rows_over_all_layers_count_only_for_what_stays(recompute: str, grows: bool) -> None:
    plan = planned(parallel__expert_parallel_size=8, train__recompute=recompute)

    def total(**changes: float) -> float:
        return plan_memory(plan.shape, plan.layout, replace(plan.loads, **changes), "cuda").total

    loads = plan.loads
    more = total(most_rows=2 * loads.most_rows, most_arriving=2 * loads.most_arriving)
    assert (more > plan.memory.total) is grows
    assert total(busiest_rows=9 * loads.busiest_rows, busiest_arriving=9 * loads.busiest_arriving) > plan.memory.total
