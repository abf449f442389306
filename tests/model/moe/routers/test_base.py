"""Choosing experts: the best ones, and a fair draw between equal ones."""

import math

import pytest
import torch

from moe_train.model.moe.routers.base import (
    OPTIONAL_SUMS,
    Choice,
    InputJitter,
    RouterOptions,
    choose_experts,
    expert_keys,
    gates_of,
    sum_over_tokens,
)
from moe_train.model.moe.routers.noisy_topk import NoisyTopKRouter
from moe_train.model.moe.routers.sigmoid_topk import SigmoidTopKRouter
from moe_train.model.moe.routers.softmax_topk import SoftmaxTopKRouter
from moe_train.model.moe.steps import RoutingSums
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


def test_both_ways_choose_the_same():
    """fp32 by one choice among integers, wider by two sorts; among equal scores too."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(500, 12, generator=generator).mul(3).round().div(3)  # many equal ones, of both signs
    scores[:, 0], scores[::2, 3], scores[1::2, 5] = -0.0, torch.inf, -torch.inf
    narrow, wide = choose_experts(scores, keys(500), 5), choose_experts(scores.double(), keys(500), 5)
    assert torch.equal(narrow, wide)


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


def make_choice(tokens: int, experts: int, top_k: int) -> Choice:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64, requires_grad=True)
    chosen = logits.topk(top_k, dim=1).indices
    return Choice(logits, logits.softmax(1), chosen, gates_of(logits, chosen, True))


def test_sums_of_known_gates():
    gates = torch.tensor([[0.5, 0.25], [0.75, 0.125]], dtype=torch.float64, requires_grad=True)
    experts, flat = torch.tensor([[3, 0], [3, 1]]), torch.zeros(2, 5, dtype=torch.float64)
    sums = sum_over_tokens(Choice(flat, flat.softmax(1), experts, gates), 1)
    assert sums.importance.tolist() == [0.25, 0.125, 0, 1.25, 0]
    assert sums.counts.tolist() == [1, 1, 0, 2, 0]
    assert sums.counts.dtype == torch.int64
    assert sums.load.tolist() == [1, 1, 0, 2, 0]
    assert not sums.load.requires_grad
    (grad,) = torch.autograd.grad(sums.importance @ torch.arange(5.0, dtype=torch.float64), gates)
    assert grad.tolist() == experts.tolist()
    load = torch.arange(5.0)
    assert sum_over_tokens(Choice(flat, flat.softmax(1), experts, gates, load), 1).load is load
    assert sums.entropy.item() == pytest.approx(2 * math.log(5))
    assert sums.squared_logsumexp.item() == pytest.approx(2 * math.log(5) ** 2)


@pytest.mark.parametrize(("sequences", "length", "top_k"), [(1, 12, 2), (3, 4, 2), (12, 1, 3), (2, 6, 1)])
def test_sums_against_a_loop(sequences, length, top_k):
    choice = make_choice(sequences * length, 5, top_k)
    sums = sum_over_tokens(choice, sequences)
    probability = choice.probability_TE.tolist()
    by_sequence = 0.0
    for n in range(sequences):
        here = range(n * length, (n + 1) * length)
        for i in range(5):
            share = sum(choice.experts_TK[t].tolist().count(i) for t in here) / (top_k * length)
            by_sequence += 5 * share * sum(probability[t][i] for t in here) / length
    assert sums.sequence_balance.item() == pytest.approx(by_sequence, rel=1e-12)  # fp64
    entropy = -sum(p * math.log(p) for row in probability for p in row)
    assert sums.entropy.item() == pytest.approx(entropy, rel=1e-12)
    squares = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in choice.logits_TE.tolist())
    assert sums.squared_logsumexp.item() == pytest.approx(squares, rel=1e-12)
    torch.testing.assert_close(sums.probability, choice.probability_TE.sum(0), rtol=1e-12, atol=0)
    assert (sums.tokens.item(), sums.sequences.item()) == (sequences * length, sequences)
    assert not sums.entropy.requires_grad and sums.sequence_balance.requires_grad


@pytest.mark.parametrize("wanted", [set(), {"probability"}, {"sequence_balance", "entropy"}, {"squared_logsumexp"}])
def test_what_nobody_asks_for_is_not_formed(wanted):
    whole = sum_over_tokens(make_choice(8, 5, 2), 2)
    sums = sum_over_tokens(make_choice(8, 5, 2), 2, frozenset(wanted))
    for name in RoutingSums.__dataclass_fields__:
        expected = getattr(whole, name)
        if name in OPTIONAL_SUMS - wanted:
            expected = torch.zeros_like(expected)
        assert torch.equal(getattr(sums, name), expected), name


def test_jitter_is_uniform_belongs_to_the_token_and_is_for_training_only():
    jitter = InputJitter(0.25, layer_key=4)
    factors = jitter(torch.ones(2000, 6), keys(2000))
    assert factors.min() >= 0.75 and factors.max() <= 1.25
    # A uniform number's deviation is its width over sqrt(12); 12,000 of them, and five standard errors.
    assert abs(factors.mean().item() - 1) < 5 * 0.5 / 12**0.5 / 12000**0.5
    assert factors.std().item() == pytest.approx(0.5 / 12**0.5, rel=0.03)
    assert len(factors.unique()) > 11_000  # fp32 numbers: a few coincide
    assert torch.equal(jitter(torch.ones(10, 6), keys(10, start=50)), factors[50:60])
    assert not torch.equal(InputJitter(0.25, layer_key=5)(torch.ones(2000, 6), keys(2000)), factors)
    assert jitter(torch.ones(2, 6, dtype=torch.bfloat16), keys(2)).dtype == torch.float32
    router = SoftmaxTopKRouter(6, 4, 2, True, init_std=1.0, options=RouterOptions(jitter))
    plain = SoftmaxTopKRouter(6, 4, 2, True, init_std=1.0)
    plain.load_state_dict(router.state_dict())
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(router.train()(x, keys(50)).logits_TE, plain(jitter(x, keys(50)), keys(50)).logits_TE)
    assert torch.equal(router.eval()(x, keys(50)).logits_TE, plain(x, keys(50)).logits_TE)


@pytest.mark.parametrize("kind", ["noisy", "softmax", "sigmoid"])
def test_a_selection_bias_decides_who_is_chosen_and_not_the_gates(kind):
    options = RouterOptions(has_selection_bias=True)
    router = {
        "noisy": NoisyTopKRouter(6, 8, 2, 1e-2, True, layer_key=3, options=options),
        "softmax": SoftmaxTopKRouter(6, 8, 2, True, init_std=1.0, options=options),
        "sigmoid": SigmoidTopKRouter(6, 8, 2, True, init_std=1.0, options=options),
    }[kind].double()
    generator = torch.Generator().manual_seed(2)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    x = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    without = router(x, keys(300))
    router.selection_bias[5], router.selection_bias[0] = 50.0, -50.0
    biased = router(x, keys(300))
    assert biased.sums.counts[5] == 300 and biased.sums.counts[0] == 0
    assert 0 < without.sums.counts[0] < 300 and without.sums.counts[5] < 300
    assert torch.equal(biased.logits_TE, without.logits_TE)
    assert (biased.gates_TK.sum(1) - 1).abs().max() < 1e-12  # fp64
    same = (biased.experts_TK.sort(1).values == without.experts_TK.sort(1).values).all(1)
    assert same.any()
    for t in same.nonzero().flatten().tolist():
        ours, theirs = (dict(zip(r.experts_TK[t].tolist(), r.gates_TK[t].tolist())) for r in (biased, without))
        assert ours == pytest.approx(theirs, rel=1e-12)
    if kind == "noisy":  # the estimate of being chosen knows of the bias
        assert biased.sums.load.tolist()[::5] == pytest.approx([0, 300], abs=1e-9)


def test_without_a_bias_there_is_no_buffer():
    assert not dict(SoftmaxTopKRouter(6, 8, 2, True, 0.02).named_buffers())
    biased = SoftmaxTopKRouter(6, 8, 2, True, 0.02, options=RouterOptions(has_selection_bias=True))
    assert list(dict(biased.named_buffers())) == ["selection_bias"]
    assert biased.selection_bias.dtype == torch.float32
