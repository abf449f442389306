"""Choosing a token from its logits."""

import pytest
import torch

from moe_train.infer.sampling import GREEDY, Sampling, choose_tokens, distribution, draw_tokens

LOGITS = torch.tensor([0.0, 1.0, -1.0, 2.0])
DRAWS = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # a grid: only its step errs


def shares(sampling, logits=LOGITS):
    chosen = choose_tokens(logits.expand(len(DRAWS), -1), sampling, DRAWS)
    return torch.bincount(chosen, minlength=len(logits)).double() / len(DRAWS)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_draws_follow_the_distribution(temperature):
    expected = (LOGITS.double() / temperature).softmax(0)
    assert torch.allclose(shares(Sampling(temperature)), expected, atol=1e-4)


def test_greedy():
    assert shares(GREEDY).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("top_k", "kept"), [(1, [3]), (2, [1, 3]), (3, [0, 1, 3]), (9, [0, 1, 2, 3])])
def test_top_k(top_k, kept):
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = (LOGITS[kept].double() / 0.8).softmax(0)
    assert torch.allclose(shares(Sampling(0.8, top_k=top_k)), expected, atol=1e-4)


# Probabilities at temperature 1: 0.644, 0.237, 0.087, 0.032 of tokens 3, 1, 0, 2.
@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, [3]), (0.64, [3]), (0.65, [1, 3]), (0.88, [1, 3]), (0.95, [0, 1, 3]), (1.0, range(4))]
)
def test_top_p_takes_as_few_as_reach_it(top_p, kept):
    kept = list(kept)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = LOGITS[kept].double().softmax(0)
    assert torch.allclose(shares(Sampling(1.0, top_p=top_p)), expected, atol=1e-4)


def test_top_k_comes_before_top_p():
    # Of the best two, 0.731 and 0.269.
    assert torch.allclose(shares(Sampling(1.0, top_k=2, top_p=0.72)), torch.tensor([0, 0, 0, 1.0]).double())
    both = shares(Sampling(1.0, top_k=2, top_p=0.74))
    assert torch.allclose(both, torch.tensor([0, 0.268941, 0, 0.731059]).double(), atol=1e-4)


def test_rows_are_drawn_for_themselves():
    logits = torch.stack([LOGITS, -LOGITS])
    draws = torch.tensor([0.01, 0.01], dtype=torch.float64)
    assert choose_tokens(logits, Sampling(1.0), draws).tolist() == [3, 2]
    assert choose_tokens(logits, Sampling(1.0), torch.tensor([0.01, 0.999999])).tolist() == [3, 3]


def test_extreme_logits():
    logits = torch.tensor([[1e30, -1e30, 1e30], [-torch.inf, 5.0, -torch.inf]])
    assert choose_tokens(logits, Sampling(0.1), torch.tensor([0.9999, 0.5], dtype=torch.float64)).tolist() == [2, 1]


def test_a_temperature_near_zero_takes_the_likeliest():
    for temperature in (1e-9, 1e-310):
        assert shares(Sampling(temperature)).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(0.7), Sampling(1.3, top_k=3), Sampling(0.9, top_p=0.6), Sampling(1.0, 3, 0.8)]
)
def test_the_distribution_is_what_tokens_are_drawn_from(sampling):
    whole_1V = distribution(LOGITS[None], sampling)
    assert torch.equal(
        choose_tokens(LOGITS.expand(len(DRAWS), -1), sampling, DRAWS),
        draw_tokens(whole_1V.expand(len(DRAWS), -1), DRAWS),
    )
    assert torch.allclose(shares(sampling), whole_1V[0], atol=1e-4)
