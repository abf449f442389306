"""Router z-loss, which keeps logits small.

Source: Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, equation 5.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_train.model.moe.balance.base import BalanceContext, BalanceKind
from moe_train.model.moe.steps import RoutingSums


@dataclass(frozen=True)
class ZLoss:
    """Loss term coef * mean over tokens of logsumexp(logits)^2."""

    coef: float

    def loss(self, sums: RoutingSums, context: BalanceContext) -> Tensor:
        """Compute the term, added up over layers.

        It is this rank's part of a mean over ranks, because it is linear in tokens.

        Args:
            sums: [L, ...] sums of this rank's micro-batch.
            context: Not used.
        """
        del context
        return self.coef * (sums.squared_logsumexp / sums.tokens.clamp(min=1)).sum()


Z_LOSS = BalanceKind(
    weight=lambda moe, section: moe.z_loss_coef,
    field="z_loss_coef",
    term=lambda moe, section: ZLoss(moe.z_loss_coef),
    sums=lambda moe, section: frozenset({"squared_logsumexp"}),
)
