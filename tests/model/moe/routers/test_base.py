"""Choosing experts: the best ones, and a fair draw between equal ones."""

import pytest
import torch

from moe_train.model.moe.routers.base import choose_experts, expert_keys, gates_of, sum_over_tokens
from moe_train.ops.keyed_random import combine, make_key


def keys(count: int, start: int = 0) -> torch.Tensor:
    return combine(make_key("tokens"), torch.arange(start, start + count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (8, 2), (64, 2), (64, 8), (5, 5)])
def test_equal_scores_are_spread_evenly(num_experts, top_k, dtype):
    tokens = 8000
    experts = choose_experts(torch.zeros(tokens, num_experts, dtype=dtype), keys(tokens), top_k)
    assert experts.shape == (tokens, top_k)
    for k in range(top_k):  # every place of its own
        counts = torch.bincount(experts[:, k], minlength=num_experts)
        share = 1 / num_experts
        # Six standard deviations of a binomial count.
        assert (counts - tokens * share).abs().max() < 6 * (tokens * share * (1 - share)) ** 0.5
    assert all(len(set(row)) == top_k for row in experts[:500].tolist())


def test_only_equal_scores_are_drawn():
    scores = torch.tensor([0.0, 3.0, 3.0, -1.0, 3.0, 5.0]).expand(3000, 6)
    experts = choose_experts(scores, keys(3000), 3)
    assert (experts[:, 0] == 5).all()
    assert set(experts[:, 1:].flatten().tolist()) == {1, 2, 4}
    counts = torch.bincount(experts[:, 1], minlength=6)[[1, 2, 4]]
    assert (counts - 1000).abs().max() < 6 * (3000 * 2 / 9) ** 0.5  # six standard deviations


@pytest.mark.parametrize("value", [1.0, -1.0, 1e-30, 1e30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_one_unit_apart_are_not_equal(value, dtype):
    row = [torch.tensor(value, dtype=dtype)]
    for _ in range(7):
        row.append(torch.nextafter(row[-1], torch.tensor(torch.inf, dtype=dtype)))
    shuffle = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    scores = torch.stack(row)[shuffle].expand(500, 8)
    assert torch.equal(choose_experts(scores, keys(500), 3), scores.topk(3, dim=1).indices)


def test_distinct_scores_give_top_k_whatever_the_keys():
    scores = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    expected = scores.topk(4, dim=1).indices
    assert torch.equal(choose_experts(scores, keys(400), 4), expected)
    assert torch.equal(choose_experts(scores, keys(400, start=7000), 4), expected)


def test_the_draw_belongs_to_the_token():
    scores = torch.zeros(50, 8)
    whole = choose_experts(scores, keys(50), 2)
    halves = [choose_experts(scores[:20], keys(20), 2), choose_experts(scores[20:], keys(30, start=20), 2)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, choose_experts(scores, keys(50, start=50), 2))


def test_expert_keys_tell_token_layer_and_expert_apart():
    table = torch.stack([expert_keys(keys(10), layer, 8) for layer in (3, 4)])
    assert table.shape == (2, 10, 8)
    assert len(table.unique()) == 2 * 10 * 8
    assert torch.equal(expert_keys(keys(10)[4:5], 3, 4), table[0, 4:5, :4])


def test_gates_formula():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0], [0.0, 0.0, 0.0, 5.0]], dtype=torch.float64)
    experts = torch.tensor([[1, 2], [3, 0]])
    e = torch.exp
    # exp in fp64
    close = {"rtol": 0, "atol": 1e-15}
    renormalized = [[e(logits[t, i]) / sum(e(logits[t, j]) for j in experts[t]) for i in experts[t]] for t in range(2)]
    torch.testing.assert_close(
        gates_of(logits, experts, True), torch.tensor(renormalized, dtype=torch.float64), **close
    )
    among_all = [[e(logits[t, i]) / e(logits[t]).sum() for i in experts[t]] for t in range(2)]
    torch.testing.assert_close(gates_of(logits, experts, False), torch.tensor(among_all, dtype=torch.float64), **close)


def test_sums_over_tokens():
    gates = torch.tensor([[0.5, 0.25], [0.75, 0.125]], dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([[3, 0], [3, 1]])
    sums = sum_over_tokens(gates, experts, None, 5)
    assert sums.importance.tolist() == [0.25, 0.125, 0, 1.25, 0]
    assert sums.counts.tolist() == [1, 1, 0, 2, 0]
    assert sums.counts.dtype == torch.int64
    assert sums.load.tolist() == [1, 1, 0, 2, 0]
    assert not sums.load.requires_grad
    (grad,) = torch.autograd.grad(sums.importance @ torch.arange(5.0, dtype=torch.float64), gates)
    assert grad.tolist() == experts.tolist()
    load = torch.arange(5.0)
    assert sum_over_tokens(gates, experts, load, 5).load is load
