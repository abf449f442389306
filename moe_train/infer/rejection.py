"""The rule of speculative decoding: which proposed tokens stay, so that the text has the target's distribution.

A proposed token x stays with probability min(1, p(x) / q(x)). At the first one that does not stay, a token is drawn
from the part of p that exceeds q, and the rest of the proposal is dropped. If all stay, one more token is drawn from
the last p.

Source: Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318.
Legend: B sequences, N proposed tokens, V vocab_size; p target's and q draft's probabilities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.infer.sampling import draw_tokens


@dataclass(frozen=True)
class Verdict:
    """The target's verdict on the proposed tokens of a round.

    Attributes:
        accepted_B: int64, proposed tokens that stay, 0 to N.
        next_B: int64, token after those that stay.
    """

    accepted_B: Tensor
    next_B: Tensor


def judge(proposed_BN: Tensor, q_BNV: Tensor, p_BMV: Tensor, accept_draws_BN: Tensor, next_draws_BM: Tensor) -> Verdict:
    """Accept proposed tokens up to the first rejection, and draw the token after them.

    Args:
        proposed_BN: int64 tokens, each drawn from its q.
        q_BNV: fp64 probabilities that the proposed tokens were drawn from.
        p_BMV: fp64 probabilities of the target at the same N places and the one after them; M = N + 1.
        accept_draws_BN: fp64 uniform numbers in (0, 1), one per proposed token.
        next_draws_BM: fp64 uniform numbers in (0, 1), for the token that is drawn at each place if it is the last.

    Returns:
        The verdict. Accepted tokens with the next one have exactly the distribution of tokens drawn from p.
    """
    number = proposed_BN.shape[1]
    p_BN, q_BN = (x.gather(2, proposed_BN.unsqueeze(2)).squeeze(2) for x in (p_BMV[:, :number], q_BNV))
    stays_BN = accept_draws_BN <= p_BN / q_BN  # q > 0, since the token was drawn from it
    accepted_B = stays_BN.long().cumprod(1).sum(1)
    rows = torch.arange(len(proposed_BN), device=proposed_BN.device)
    # Behind the last proposed token there is no q, and the whole of p is left.
    q_BMV = torch.cat((q_BNV, torch.zeros_like(p_BMV[:, :1])), dim=1)
    left_BV = residual(p_BMV[rows, accepted_B], q_BMV[rows, accepted_B])
    return Verdict(accepted_B, draw_tokens(left_BV, next_draws_BM[rows, accepted_B]))


def residual(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """Compute the distribution of the token in place of a rejected one: max(p - q, 0), normalised. fp64 [B, V].

    Where nothing is left, p and q are equal but for rounding, and it is p.
    """
    left_BV = (p_BV - q_BV).clamp(min=0.0)
    total_B1 = left_BV.sum(1, keepdim=True)
    return torch.where(total_B1 > 0, left_BV / total_B1, p_BV)
