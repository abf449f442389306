"""Balance term of Switch and GShard.

Source: Fedus et al. 2021 (Switch), arXiv 2101.03961, equations 4-6; Lepikhin et al. 2020 (GShard), arXiv 2006.16668;
per sequence: DeepSeek-V3, arXiv 2412.19437, equations 17-20, but with the experts really chosen,
bias and groups included.
Legend: L MoE layers, E experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_train.distributed.collectives import Group, all_reduce_sum
from moe_train.model.moe.balance.base import BalanceKind
from moe_train.model.moe.steps import RoutingSums


@dataclass(frozen=True)
class SwitchAux:
    """Loss term coef * E sum_i f_i p_i, f_i: expert i's share of the assignments, p_i: its mean probability.

    f has no gradient. A balanced router gives coef. Tokens that all choose the same K experts with probability 1/K each
    give coef * E / K.

    Attributes:
        coef: Weight of the term.
        scope: Tokens that f and p are computed from. micro_batch: those of this rank; sequence: those of each sequence,
            and the sequences' values are averaged; global: those of all ranks of the group.
    """

    coef: float
    scope: Literal["micro_batch", "sequence", "global"] = "global"

    def loss(self, sums: RoutingSums, group: Group | None) -> Tensor:
        """Compute the term, added up over layers.

        Args:
            sums: [L, ...] sums of this rank's micro-batch.
            group: Ranks whose sums are added first, for scope global.

        Returns:
            Scalar; for scope global, the same on all ranks of the group, else this rank's part of a mean over ranks.

        Collective: All ranks of the group, for scope global.
        """
        if self.scope == "sequence":
            return self.coef * (sums.sequence_balance / sums.sequences).sum()
        counts_LE, probability_LE = sums.counts.to(sums.probability.dtype), sums.probability
        if self.scope == "global":  # one all-reduce for both
            counts_LE, probability_LE = all_reduce_sum(torch.stack((counts_LE, probability_LE)), group).unbind(0)
        share_LE = counts_LE.detach() / counts_LE.detach().sum(-1, keepdim=True).clamp(min=1)
        # The distribution adds up to one for every token, so that the sum over experts is the number of tokens.
        mean_LE = probability_LE / probability_LE.detach().sum(-1, keepdim=True).clamp(min=1)
        return self.coef * counts_LE.shape[-1] * (share_LE * mean_LE).sum()


SWITCH_AUX = BalanceKind(
    weight=lambda moe, section: moe.switch_aux_coef,
    field="switch_aux_coef",
    term=lambda moe, section: SwitchAux(moe.switch_aux_coef, moe.switch_scope),
    sums=lambda moe, section: frozenset({"sequence_balance" if moe.switch_scope == "sequence" else "probability"}),
    reduces=lambda moe, section: moe.switch_scope == "global",
)
