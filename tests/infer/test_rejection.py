"""The rule of speculative decoding: exactly the target's distribution, for any two distributions."""

import pytest
import torch

from moe_train.infer.rejection import judge, residual
from moe_train.infer.sampling import Sampling, distribution
from tests.vectors.speculative import acceptance

SETTINGS = {
    "plain": Sampling(1.0),
    "cold": Sampling(0.3),
    "top_k": Sampling(0.8, top_k=3),
    "top_p": Sampling(1.2, top_p=0.7),
    "both": Sampling(0.9, top_k=4, top_p=0.8),
    "greedy": Sampling(0.0),
}
settings = pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)


def random_logits(rows, vocab=6, seed=0):
    return 2 * torch.randn(rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings
def test_what_stays_and_what_replaces_the_rest_add_up_to_p(sampling):
    p, q = (distribution(random_logits(500, seed=seed), sampling) for seed in (1, 2))
    assert float((p.sum(1) - 1).abs().max()) < 1e-15
    stays = torch.minimum(p, q)
    torch.testing.assert_close(acceptance(p, q), 1 - (p - q).abs().sum(1) / 2, rtol=0, atol=1e-15)
    found = stays + (1 - acceptance(p, q)).unsqueeze(1) * residual(p, q)
    torch.testing.assert_close(found, p, rtol=0, atol=1e-15)
    torch.testing.assert_close(residual(p, p), p, rtol=0, atol=0)  # nothing is left of p


@settings
@pytest.mark.parametrize("is_draft_greedy", [False, True])
def test_judged_tokens_have_the_targets_distribution(sampling, is_draft_greedy):
    """All draws of a fine grid: the shares of the first token are p's, and of one behind an accepted token the next
    p's."""
    size, grid = 4, 200
    p_2V = distribution(random_logits(2, size, seed=3), sampling)
    q_1V = distribution(random_logits(1, size, seed=4), Sampling(0.0) if is_draft_greedy else sampling)
    draws = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    token = torch.arange(size).repeat_interleave(grid**2)
    accept, following = draws.repeat_interleave(grid).repeat(size), draws.repeat(size * grid)
    drawn = q_1V[0, token] > 0  # only such tokens are proposed
    token, accept, following = token[drawn], accept[drawn], following[drawn]
    rows = len(token)
    next_draws = torch.stack((following, following), dim=1)
    p_BMV, q_BNV = p_2V.expand(rows, -1, -1), q_1V.expand(rows, 1, -1)
    verdict = judge(token.unsqueeze(1), q_BNV, p_BMV, accept.unsqueeze(1), next_draws)
    weight = q_1V[0, token] / grid**2
    first = torch.where(verdict.accepted_B == 1, token, verdict.next_B)
    shares = torch.zeros(size, dtype=torch.float64).index_add_(0, first, weight)
    torch.testing.assert_close(shares, p_2V[0], rtol=0, atol=2 * size / grid)
    stays = verdict.accepted_B == 1
    assert float(weight[stays].sum()) == pytest.approx(float(acceptance(p_2V[:1], q_1V)), abs=size / grid)
    for accepted in token[stays].unique():
        chosen = stays & (token == accepted)
        second = torch.zeros(size, dtype=torch.float64).index_add_(0, verdict.next_B[chosen], weight[chosen])
        torch.testing.assert_close(second / second.sum(), p_2V[1], rtol=0, atol=2 * size / grid)


def test_tokens_end_at_the_first_rejection():
    p = torch.full((1, 4, 5), 0.2, dtype=torch.float64)
    q = p[:, :3].clone()
    q[0, 1] = torch.tensor([1.0, 0, 0, 0, 0])  # the second token stays with probability 0.2
    proposed, after = torch.tensor([[2, 0, 3]]), torch.full((1, 4), 0.5, dtype=torch.float64)
    draws = torch.tensor([[0.9, 0.19, 0.9]], dtype=torch.float64)
    assert judge(proposed, q, p, draws, after).accepted_B.tolist() == [3]
    draws[0, 1] = 0.21
    verdict = judge(proposed, q, p, draws, after)
    assert verdict.accepted_B.tolist() == [1]
    assert int(verdict.next_B) != 0  # of token 0 nothing is left
