"""Choosing the next token from its logits: greedy, or drawn at a temperature from the likeliest tokens.

Legend: B sequences, V vocab_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Only the so many likeliest tokens are drawn from; None: all.
        top_p: Only the likeliest tokens are drawn from whose probabilities add up to at least this, as few as possible,
            after top_k; None: all.
        seed: Of the draws.

    Source: top_p, nucleus sampling: Holtzman et al. 2019, arXiv 1904.09751.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


GREEDY = Sampling()


def choose_tokens(logits_BV: Tensor, sampling: Sampling, draws_B: Tensor) -> Tensor:
    """A token of each sequence, by the inverse of its distribution function over the tokens, likeliest first.

    Args:
        logits_BV: Of one position of each.
        sampling: How.
        draws_B: fp64, uniform numbers in (0, 1).

    Returns:
        int64 [B].
    """
    if sampling.temperature == 0.0:
        return logits_BV.argmax(1)
    # fp64: the sum of many small probabilities has to come to 1. A stable sort: equal logits stay in order of tokens.
    ranked_BV, order_BV = logits_BV.double().sort(dim=1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked_BV = ranked_BV[:, : sampling.top_k]
    # The largest becomes 0 first: however low the temperature, nothing but -inf overflows.
    probability_BV = ((ranked_BV - ranked_BV[:, :1]) / sampling.temperature).softmax(1)
    cumulative_BV = probability_BV.cumsum(1)
    if sampling.top_p is not None:
        is_in_BV = cumulative_BV - probability_BV < sampling.top_p  # the first that reaches it is still in
        cumulative_BV = (probability_BV * is_in_BV).cumsum(1)
    total_B1 = cumulative_BV[:, -1:]
    index_B1 = torch.searchsorted(cumulative_BV, draws_B.unsqueeze(1) * total_B1)
    return order_BV.gather(1, index_B1.clamp(max=cumulative_BV.shape[1] - 1)).squeeze(1)
