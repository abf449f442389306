"""Top-k gating over sigmoids, limited to the best groups of experts.

Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv 2412.19437, equations 12-16 and section 2.1.2.
Legend: T tokens, D hidden_size, E experts, K top_k, G groups.
"""

import torch
from torch import Tensor

from moe_train.model.cost import RouterCost
from moe_train.model.layers import WideLinear
from moe_train.model.moe.routers.base import (
    PLAIN,
    Choice,
    Router,
    RouterKind,
    RouterOptions,
    RouterSpec,
    choose_experts,
    choose_groups,
)

_TINY = 1e-20  # where every score underflows to zero


class SigmoidTopKRouter(Router):
    """A router with scores s = sigmoid(logits).

    It chooses by s plus the selection bias; gate = s / sum of the chosen s, times a factor.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        renormalize: bool,
        init_std: float,
        num_groups: int = 1,
        top_k_groups: int = 1,
        scaling_factor: float = 1.0,
        options: RouterOptions = PLAIN,
    ) -> None:
        super().__init__(num_experts, top_k, options)
        self.gate = WideLinear(hidden_size, num_experts, init_std)
        self.renormalize, self.scaling_factor = renormalize, scaling_factor
        self.num_groups, self.top_k_groups = num_groups, top_k_groups

    def choose(self, x_TD: Tensor, token_keys_T: Tensor) -> Choice:
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.sigmoid()
        selection_TE = self.with_bias(scores_TE)
        if self.num_groups > 1:
            outside_TE = outside_best_groups(selection_TE, token_keys_T, self.num_groups, self.top_k_groups)
            selection_TE = selection_TE.masked_fill(outside_TE, -torch.inf)
        experts_TK = choose_experts(selection_TE, token_keys_T, self.top_k)
        gates_TK = scores_TE.gather(1, experts_TK)
        if self.renormalize:
            gates_TK = gates_TK / (gates_TK.sum(1, keepdim=True) + _TINY)
        probability_TE = scores_TE / (scores_TE.sum(1, keepdim=True) + _TINY)
        return Choice(logits_TE, probability_TE, experts_TK, gates_TK * self.scaling_factor)


def outside_best_groups(scores_TE: Tensor, token_keys_T: Tensor, num_groups: int, top_k_groups: int) -> Tensor:
    """Mark the experts that a token may not use: those outside its best groups.

    Args:
        scores_TE: Scores that decide; a group's score is the sum of its two best experts' scores (or its only one's).
        token_keys_T: int64 random key of each token; it decides between groups of equal score.
        num_groups: G, number of groups, of E / G consecutive experts each.
        top_k_groups: Number of groups that a token may use.

    Returns:
        bool [T, E].
    """
    groups_TGe = scores_TE.detach().unflatten(1, (num_groups, -1))  # (T, E) -> (T, G, E/G)
    score_TG = groups_TGe.topk(min(2, groups_TGe.shape[2]), dim=2).values.sum(2)
    best_Tg = choose_groups(score_TG, token_keys_T, top_k_groups)
    outside_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter(1, best_Tg, False)
    return outside_TG.repeat_interleave(scores_TE.shape[1] // num_groups, dim=1)


def _build(spec: RouterSpec) -> SigmoidTopKRouter:
    moe = spec.model.moe
    return SigmoidTopKRouter(
        spec.model.hidden_size,
        moe.num_experts,
        moe.top_k,
        moe.gates_sum_to_one,
        spec.model.init_std,
        moe.num_groups,
        moe.top_k_groups or 1,
        moe.routed_scaling_factor,
        spec.options,
    )


SIGMOID_TOPK = RouterKind(_build, RouterCost(products=1, kept=4, forward=50, backward=20))
