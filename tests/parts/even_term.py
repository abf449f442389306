"""A balance term: what experts had more than their share of in the last step, times their probability in this one."""

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from moe_train.config.base import Section
from moe_train.model.moe.balance.base import BalanceContext, BalanceKind
from moe_train.model.moe.steps import RoutingSums


class EvenConfig(Section):
    """Settings of the term."""

    coef: float = Field(0.1, ge=0.0)
    """Weight of the term."""


@dataclass(frozen=True)
class EvenTerm:
    """coef * sum over experts of (E f - 1) p, f being the share of the last step and p the mean probability."""

    coef: float

    def loss(self, sums: RoutingSums, context: BalanceContext) -> Tensor:
        excess_LE = context.last.share_LE * sums.probability.shape[-1] - context.last.known_L.unsqueeze(-1)
        parts = (excess_LE.to(sums.probability.dtype) * sums.probability).sum()
        return self.coef * context.size.num_parts / context.size.num_tokens * parts

    def value_of_step(self, sums: RoutingSums) -> Tensor:
        share_LE = sums.counts / sums.counts.sum(-1, keepdim=True)
        probability_LE = sums.probability / sums.probability.sum(-1, keepdim=True)
        return self.coef * ((share_LE * share_LE.shape[-1] - 1) * probability_LE).sum()


KIND = BalanceKind(
    weight=lambda moe, section: section.coef,
    term=lambda moe, section: EvenTerm(section.coef),
    sums=lambda moe, section: frozenset({"probability"}),
    remembers=lambda moe, section: frozenset({"share"}),
    section=EvenConfig,
)
