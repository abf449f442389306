"""A balance term: the squared deviation of the mean distribution from the even one."""

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from moe_train.config.base import Section
from moe_train.distributed.collectives import all_reduce_sum
from moe_train.model.moe.balance.base import BalanceContext, BalanceKind
from moe_train.model.moe.steps import RoutingSums


class EvenConfig(Section):
    """Settings of the term."""

    coef: float = Field(0.1, ge=0.0)
    """Weight of the term."""


@dataclass(frozen=True)
class EvenTerm:
    """coef * sum over experts of (E p - 1)^2, p being the mean probability over all ranks."""

    coef: float

    def loss(self, sums: RoutingSums, context: BalanceContext) -> Tensor:
        probability_LE = all_reduce_sum(sums.probability, context.group)
        mean_LE = probability_LE / probability_LE.sum(-1, keepdim=True)
        return self.coef * (mean_LE * mean_LE.shape[-1] - 1).square().sum()


KIND = BalanceKind(
    weight=lambda moe, section: section.coef,
    term=lambda moe, section: EvenTerm(section.coef),
    sums=lambda moe, section: frozenset({"probability"}),
    reduces=lambda moe, section: True,
    section=EvenConfig,
)
