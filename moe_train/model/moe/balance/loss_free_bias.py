"""Balancing without a loss: a bias on the choice, moved after each step.

Source: Wang et al. 2024, arXiv 2408.15664, algorithm 1.
Legend: L MoE layers, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.model.moe.balance.base import BalanceKind


@dataclass(frozen=True)
class LossFreeBias:
    """Bias rule b += rate * sign(mean(c) - c), where c is the number of tokens that chose the expert in the step.

    Attributes:
        rate: Update rate, u in the paper, 1e-3 there.
    """

    rate: float

    @torch.no_grad()
    def after_step(self, bias_LE: Tensor, counts_LE: Tensor, factor: float) -> Tensor:
        """Compute the next bias, [L, E] fp32.

        Args:
            bias_LE: fp32, bias during the step.
            counts_LE: int64, assignments per expert over all ranks and micro-batches of the step.
            factor: Factor of the rate at this step.
        """
        # E c against the sum: the same comparison as c against the mean, in whole numbers.
        below_LE = (counts_LE.sum(-1, keepdim=True) - counts_LE.shape[-1] * counts_LE).sign()
        return bias_LE + self.rate * factor * below_LE.to(bias_LE.dtype)


LOSS_FREE_BIAS = BalanceKind(
    weight=lambda moe, section: moe.bias_update_rate,
    field="bias_update_rate",
    rule=lambda moe, section: LossFreeBias(moe.bias_update_rate),
)
