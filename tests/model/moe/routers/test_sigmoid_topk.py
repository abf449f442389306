"""Sigmoid gating with groups: against a loop over tokens."""

import pytest
import torch

from moe_train.model.moe.routers.base import RouterOptions
from moe_train.model.moe.routers.sigmoid_topk import SigmoidTopKRouter, outside_best_groups
from moe_train.ops.keyed_random import combine, make_key

HIDDEN, EXPERTS, TOKENS = 5, 12, 50


def make(top_k=3, num_groups=1, top_k_groups=1, renormalize=True, scaling=1.0, has_bias=False):
    options = RouterOptions(has_selection_bias=has_bias)
    router = SigmoidTopKRouter(
        HIDDEN, EXPERTS, top_k, renormalize, 1.0, num_groups, top_k_groups, scaling, options
    ).double()
    generator = torch.Generator().manual_seed(0)
    router.gate.weight.data = torch.randn(EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)
    if has_bias:
        router.selection_bias = torch.randn(EXPERTS, generator=generator)
    return router


def tokens(count=TOKENS):
    x = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, combine(make_key("t"), torch.arange(count))


def slowly_chosen(scores, top_k, num_groups, top_k_groups):
    size = EXPERTS // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    best = sorted(groups, key=lambda group: -sum(sorted((scores[i] for i in group), reverse=True)[:2]))
    allowed = [i for group in best[:top_k_groups] for i in group]
    return sorted(allowed, key=lambda i: -scores[i])[:top_k]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_groups", "top_k_groups"), [(1, 1), (4, 2), (3, 1), (12, 5)])
def test_choice_and_gates_against_a_loop(training, has_bias, renormalize, num_groups, top_k_groups):
    router = make(3, num_groups, top_k_groups, renormalize, 2.5, has_bias).train(training)
    x, keys = tokens()
    routing = router(x, keys)
    scores = 1 / (1 + torch.exp(-(x @ router.gate.weight.T)))
    for t in range(TOKENS):
        selection = scores[t] + (router.selection_bias.double() if has_bias else 0)
        chosen = slowly_chosen(selection.tolist(), 3, num_groups, top_k_groups)
        assert routing.experts_TK[t].tolist() == chosen
        gates = scores[t, chosen] / (scores[t, chosen].sum() if renormalize else 1) * 2.5
        torch.testing.assert_close(routing.gates_TK[t], gates, rtol=1e-12, atol=0)  # fp64
    distribution = (scores / scores.sum(1, keepdim=True)).sum(0)
    torch.testing.assert_close(routing.sums.probability, distribution, rtol=1e-12, atol=0)


def test_groups_really_limit():
    x, keys = tokens(400)
    free, limited = make(3)(x, keys), make(3, 4, 2)(x, keys)
    groups = (limited.experts_TK // 3).sort(1).values
    assert all(len(set(row)) <= 2 for row in groups.tolist())
    assert any(len(set(row)) > 2 for row in (free.experts_TK // 3).tolist())


def test_equal_groups_are_drawn_evenly():
    count = 6000
    keys = combine(make_key("many"), torch.arange(count))
    outside = outside_best_groups(torch.zeros(count, EXPERTS), keys, 4, 1)
    used = (~outside).view(count, 4, 3)
    assert (used.sum((1, 2)) == 3).all() and (used.any(2) == used.all(2)).all()
    share = used[:, :, 0].sum(0)
    assert (share - count / 4).abs().max() < 6 * (count * 0.25 * 0.75) ** 0.5  # six standard deviations


@pytest.mark.parametrize(("num_groups", "top_k_groups", "top_k"), [(4, 1, 1), (4, 2, 2), (12, 3, 2)])
def test_equal_experts_of_equal_groups_are_drawn_evenly(num_groups, top_k_groups, top_k):
    """A group's draw must not be that of the expert with its number."""
    router = make(top_k, num_groups, top_k_groups)
    router.gate.weight.data.zero_()
    count = 12_000
    counts = router(torch.zeros(count, HIDDEN, dtype=torch.float64), tokens(count)[1]).sums.counts
    share = top_k / EXPERTS
    assert (counts - count * share).abs().max() < 6 * (count * share * (1 - share)) ** 0.5  # six standard deviations


def test_a_score_does_not_depend_on_the_other_experts():
    router = make(3, renormalize=False)
    x, keys = tokens()
    before = router(x, keys)
    router.gate.weight.data[7] -= 100.0  # out of reach for positive inputs, ahead for negative ones
    after = router(x, keys)
    for t in range(TOKENS):
        ours, theirs = (dict(zip(r.experts_TK[t].tolist(), r.gates_TK[t].tolist())) for r in (after, before))
        for expert in ours.keys() & theirs.keys() - {7}:
            assert ours[expert] == theirs[expert]


def test_scores_that_underflow_stay_finite_with_finite_gradients():
    router = make(2).float()
    router.gate.weight.data.fill_(-200.0)
    x = torch.ones(4, HIDDEN, requires_grad=True)
    routing = router(x, tokens(4)[1])
    assert routing.gates_TK.isfinite().all() and routing.sums.probability.isfinite().all()
    (routing.gates_TK.sum() + routing.sums.sequence_balance).backward()
    assert x.grad.isfinite().all()


def test_gates_gradient_against_finite_differences():
    router = make(3, 4, 2, scaling=1.7)
    x, keys = tokens(4)
    assert torch.autograd.gradcheck(lambda x: router(x, keys).gates_TK, (x.clone().requires_grad_(),))
