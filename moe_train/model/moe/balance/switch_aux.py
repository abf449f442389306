"""The Switch / GShard balance term.

Source: Fedus et al. 2021 (Switch), arXiv 2101.03961, equations 4-6; Lepikhin et al. 2020 (GShard), arXiv 2006.16668;
per sequence: DeepSeek-V3, arXiv 2412.19437, equations 17-20, but with the experts really chosen,
bias and groups included.
Legend: L MoE layers, E experts.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_train.config.moe import MoEConfig
from moe_train.distributed.collectives import all_reduce_sum
from moe_train.model.moe.balance.base import BalanceContext, BalanceKind
from moe_train.model.moe.steps import RoutingSums


@dataclass(frozen=True)
class SwitchAux:
    """coef * E sum_i f_i p_i; f_i: expert i's share of the assignments, p_i: its mean probability. Balanced: coef.

    f has no gradient. Tokens that all choose the same K experts with probability 1/K each give coef * E / K.

    Attributes:
        coef: Weight.
        scope: Tokens that f and p are formed over. step: p over those of the optimizer step, and f over those of the
            last one, which makes it linear; micro_batch: those of this rank; sequence: each sequence's, whose values
            are averaged; global: those of a micro-step of all ranks.
    """

    coef: float
    scope: Literal["step", "micro_batch", "sequence", "global"] = "step"

    def loss(self, sums: RoutingSums, context: BalanceContext) -> Tensor:
        """Compute this part's loss.

        Args:
            sums: [L, ...] sums of this rank's micro-batch.
            context: Sizes of the step, and the sums of the last one.

        Returns:
            Scalar, added up over layers; for scope global the same on all ranks.

        Collective: All ranks, for scope global.
        """
        if self.scope == "sequence":
            return self.coef * (sums.sequence_balance / sums.sequences).sum()
        num_experts = sums.counts.shape[-1]
        if self.scope == "step":
            share_LE = context.last.share_LE.to(sums.probability.dtype)
            parts_L = (share_LE * sums.probability).sum(-1) * context.last.known_L
            return self.coef * num_experts * context.size.num_parts / context.size.num_tokens * parts_L.sum()
        counts_LE, probability_LE = sums.counts.to(sums.probability.dtype), sums.probability
        if self.scope == "global":  # one all-reduce for both
            both = torch.stack((counts_LE, probability_LE))
            counts_LE, probability_LE = all_reduce_sum(both, context.group).unbind(0)
        return self.coef * switch_balance(counts_LE, probability_LE).sum()

    def value_of_step(self, sums: RoutingSums) -> Tensor:
        return self.coef * switch_balance(sums.counts.to(sums.probability.dtype), sums.probability).sum()


def switch_balance(counts: Tensor, probability: Tensor) -> Tensor:
    """E sum_i f_i p_i, f without gradient.

    Args:
        counts: [..., E], assignments per expert.
        probability: [..., E], sums over tokens of the router's distribution.

    Returns:
        [...].
    """
    share = counts.detach() / counts.detach().sum(-1, keepdim=True).clamp(min=1)
    # The distribution adds up to one for every token, so that the sum over experts is the number of tokens.
    mean = probability / probability.detach().sum(-1, keepdim=True).clamp(min=1)
    return counts.shape[-1] * (share * mean).sum(-1)


def _sums(moe: MoEConfig, section: Any) -> frozenset[str]:
    del section
    return frozenset({"sequence_balance" if moe.switch_scope == "sequence" else "probability"})


SWITCH_AUX = BalanceKind(
    weight=lambda moe, section: moe.switch_aux_coef,
    field="switch_aux_coef",
    term=lambda moe, section: SwitchAux(moe.switch_aux_coef, moe.switch_scope),
    sums=_sums,
    remembers=lambda moe, section: frozenset({"share"} if moe.switch_scope == "step" else ()),
    reduces=lambda moe, section: moe.switch_scope == "global",
    split_setting=lambda moe, section: (
        None if moe.switch_scope in ("step", "sequence") else f"model.moe.switch_scope ({moe.switch_scope})"
    ),
)
