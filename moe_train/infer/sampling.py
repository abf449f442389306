"""Choice of the next token from its logits: greedy, or sampled at a temperature from the likeliest tokens.

Legend: B sequences, V vocab_size.
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
    # fp64, because many small probabilities must sum to 1. A stable sort keeps equal logits in the order of tokens.
    ranked_BV, order_BV = logits_BV.double().sort(dim=1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked_BV = ranked_BV[:, : sampling.top_k]
    # The largest logit becomes 0 first. So at any temperature the division can overflow only to -inf.
    probability_BV = ((ranked_BV - ranked_BV[:, :1]) / sampling.temperature).softmax(1)
    cumulative_BV = probability_BV.cumsum(1)
    if sampling.top_p is not None:
        is_in_BV = cumulative_BV - probability_BV < sampling.top_p  # the token that reaches top_p is included
        cumulative_BV = (probability_BV * is_in_BV).cumsum(1)
    total_B1 = cumulative_BV[:, -1:]
    index_B1 = torch.searchsorted(cumulative_BV, draws_B.unsqueeze(1) * total_B1)
    return order_BV.gather(1, index_B1.clamp(max=cumulative_BV.shape[1] - 1)).squeeze(1)
