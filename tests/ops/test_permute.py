"""The order of assignments by expert, against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.ops.permute import invert_order, sort_assignments


def chosen(tokens: int, top_k: int, num_experts: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, num_experts, generator=generator).topk(top_k, dim=1).indices


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(0, 20), num_experts=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_assignments_are_grouped_by_expert_in_token_order(tokens, num_experts, seed, data):
    top_k = data.draw(st.integers(1, num_experts))
    experts = chosen(tokens, top_k, num_experts, seed)
    order, counts = sort_assignments(experts, num_experts)
    flat = experts.flatten().tolist()
    expected = [a for e in range(num_experts) for a in range(len(flat)) if flat[a] == e]
    assert order.tolist() == expected
    assert counts.tolist() == [flat.count(e) for e in range(num_experts)]
    inverse = invert_order(order)
    assert [expected[i] for i in inverse.tolist()] == list(range(len(flat)))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_assignments_that_are_not_executed_stand_at_the_end(share):
    generator = torch.Generator().manual_seed(4)
    experts = chosen(9, 2, 5, 4)
    kept = torch.rand(9, 2, generator=generator) >= share
    order, counts = sort_assignments(experts, 5, kept)
    assert counts.tolist() == [int(((experts == i) & kept).sum()) for i in range(5)]
    executed = order[: int(counts.sum())].tolist()
    flat, is_kept = experts.flatten().tolist(), kept.flatten().tolist()
    assert executed == [a for e in range(5) for a in range(18) if flat[a] == e and is_kept[a]]
