"""Which assignments fit: against a loop, and what must hold for any routing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.ops.capacity import expert_capacity, within_capacity


@given(tokens=st.integers(1, 500), top_k=st.integers(1, 8), more=st.integers(0, 60), hundredths=st.integers(1, 1000))
def test_capacity_formula(tokens, top_k, more, hundredths):
    """ceil(T K / E * factor), in whole numbers."""
    experts = top_k + more
    capacity = expert_capacity(tokens, top_k, experts, hundredths / 100)
    assert capacity == -(-tokens * top_k * hundredths // (experts * 100))


def test_capacity_is_not_rounded_up_by_a_rounding_error():
    assert math.ceil(100 * 0.07) == 8  # what a product of floating numbers gives
    assert expert_capacity(100, 1, 1, 0.07) == 7


def slowly_kept(experts, priority, capacity, num_scopes):
    """One expert of one scope after the other, the best assignments first."""
    tokens, top_k = experts.shape
    length = tokens // num_scopes
    kept = torch.zeros(tokens, top_k, dtype=torch.bool)
    for scope in range(num_scopes):
        for expert in range(int(experts.max()) + 1):
            wanting = [
                (t, k)
                for t in range(scope * length, (scope + 1) * length)
                for k in range(top_k)
                if experts[t, k] == expert
            ]
            if priority is not None:
                wanting.sort(key=lambda place: -priority[place].item())  # stable: the earlier of equal ones first
            for place in wanting[:capacity]:
                kept[place] = True
    return kept


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scopes=st.integers(1, 3),
    length=st.integers(1, 8),
    top_k=st.integers(1, 3),
    capacity=st.integers(1, 9),
    policy=st.sampled_from(["gates", "equal gates", "position"]),
)
def test_against_a_loop(seed, scopes, length, top_k, capacity, policy):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(scopes * length, 5, generator=generator) ** 3 + torch.tensor([1.0, 0, 0, 0, 0])  # one is loved
    experts = scores.topk(top_k, dim=1).indices
    priority = None if policy == "position" else torch.rand(scopes * length, top_k, generator=generator)
    if policy == "equal gates":
        priority = (priority * 2).round()
    kept = within_capacity(experts, priority, 5, capacity, scopes)
    assert torch.equal(kept, slowly_kept(experts, priority, capacity, scopes))
    if capacity >= length:
        assert kept.all()


def test_the_lowest_gates_or_the_last_tokens_go():
    experts = torch.tensor([[0], [0], [0], [1]])
    gates = torch.tensor([[0.1], [0.3], [0.2], [0.01]])
    assert within_capacity(experts, gates, 2, 2, 1).flatten().tolist() == [False, True, True, True]
    assert within_capacity(experts, None, 2, 2, 1).flatten().tolist() == [True, True, False, True]


def test_scopes_do_not_see_each_other():
    generator = torch.Generator().manual_seed(0)
    experts = torch.rand(12, 4, generator=generator).topk(2, dim=1).indices
    gates = torch.rand(12, 2, generator=generator)
    whole = within_capacity(experts, gates, 4, 1, 3)
    parts = [within_capacity(experts[i : i + 4], gates[i : i + 4], 4, 1, 1) for i in (0, 4, 8)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("scopes", [1, 2])
def test_no_token_is_no_error(scopes):
    empty = torch.zeros(0, 2, dtype=torch.int64)
    assert within_capacity(empty, None, 4, 1, scopes).shape == (0, 2)
