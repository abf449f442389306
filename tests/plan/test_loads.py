"""Sampled loads: even in the mean, as uneven as asked, and as the seed says."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.plan.loads import draw_shares, row_loads
from tests.plan.cases import planned


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
