"""Choice of the next token from its logits: greedy, or sampled at a temperature from the likeliest tokens.

Legend: B sequences, V vocab_size, K of them that are left by top_k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings for the choice of a token.

    Attributes:
        temperature: Divisor of the logits; 0 takes the likeliest token.
        top_k: Number of likeliest tokens to sample from; None: all.
        top_p: Probability that the likeliest tokens must reach together; the fewest such tokens are sampled from. It is
            applied after top_k; None: all.
        seed: Seed of the draws.

    Source: top_p, nucleus sampling: Holtzman et al. 2019, arXiv 1904.09751.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


GREEDY = Sampling()


def choose_tokens(logits_BV: Tensor, sampling: Sampling, draws_B: Tensor) -> Tensor:
    """Choose a token for each sequence.

    It inverts the cumulative distribution over the tokens, which are sorted by probability, likeliest first.

    Args:
        logits_BV: Logits of one position of each sequence.
        sampling: Settings for the choice.
        draws_B: fp64, uniform numbers in (0, 1).

    Returns:
        int64 [B], the chosen tokens.
    """
    if sampling.temperature == 0.0:
        return logits_BV.argmax(1)
    return _invert(*_ranked(logits_BV, sampling), draws_B)


def distribution(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Compute the probabilities with which `choose_tokens` chooses each token.

    Args:
        logits_BV: Logits of one position of each sequence.
        sampling: Settings for the choice; with temperature 0 the likeliest token has probability 1.

    Returns:
        fp64 [B, V]; rows sum to 1.
    """
    if sampling.temperature == 0.0:
        one_BV = torch.zeros_like(logits_BV, dtype=torch.float64)
        return one_BV.scatter_(1, logits_BV.argmax(1, keepdim=True), 1.0)
    if sampling.top_k is None and sampling.top_p is None:  # without ranks, which take a sort
        logits_BV = logits_BV.double()
        return ((logits_BV - logits_BV.amax(1, keepdim=True)) / sampling.temperature).softmax(1)
    weight_BK, order_BV = _ranked(logits_BV, sampling)
    weight_BK = weight_BK / weight_BK.sum(1, keepdim=True)
    whole_BV = torch.zeros_like(logits_BV, dtype=torch.float64)
    return whole_BV.scatter_(1, order_BV[:, : weight_BK.shape[1]], weight_BK)


def draw_tokens(weight_BV: Tensor, draws_B: Tensor) -> Tensor:
    """Draw a token for each sequence, as `choose_tokens` does, from weights in place of logits.

    Args:
        weight_BV: fp64, 0 or more, at least one above 0 in each row; a token is drawn in proportion to its weight.
        draws_B: fp64, uniform numbers in (0, 1).

    Returns:
        int64 [B], the drawn tokens.
    """
    return _invert(*weight_BV.sort(dim=1, descending=True, stable=True), draws_B)


def _ranked(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the weights of the tokens by rank, likeliest first, [B, K], and the tokens by rank, [B, V]."""
    # fp64, because many small probabilities must sum to 1. A stable sort keeps equal logits in the order of tokens.
    ranked_BV, order_BV = logits_BV.double().sort(dim=1, descending=True, stable=True)
    ranked_BK = ranked_BV[:, : sampling.top_k]
    # The largest logit becomes 0 first. So at any temperature the division can overflow only to -inf.
    probability_BK = ((ranked_BK - ranked_BK[:, :1]) / sampling.temperature).softmax(1)
    if sampling.top_p is not None:
        # The token that reaches top_p is included.
        probability_BK = probability_BK * (probability_BK.cumsum(1) - probability_BK < sampling.top_p)
    return probability_BK, order_BV


def _invert(weight_BK: Tensor, order_BV: Tensor, draws_B: Tensor) -> Tensor:
    """Find the token at which the cumulative weight reaches the drawn share of the total. int64 [B]."""
    cumulative_BK = weight_BK.cumsum(1)
    index_B1 = torch.searchsorted(cumulative_BK, draws_B.unsqueeze(1) * cumulative_BK[:, -1:])
    return order_BV.gather(1, index_B1.clamp(max=cumulative_BK.shape[1] - 1)).squeeze(1)
