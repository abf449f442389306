"""Capacity of experts: an expert adds nothing to tokens over its capacity, which keep their residual stream.

Source: Lepikhin et al. 2020 (GShard), arXiv 2006.16668; Fedus et al. 2021 (Switch), arXiv 2101.03961.
Legend: T tokens, K top_k, E experts.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from moe_train.model.moe.steps import Routing
from moe_train.ops.capacity import expert_capacity, within_capacity


@dataclass(frozen=True)
class CapacityLimit:
    """Limit of the assignments that an expert takes, and the rule for which ones are dropped.

    Attributes:
        factor: Capacity in training, as a multiple of the mean assignments per expert; None: dropless.
        eval_factor: Capacity in evaluation, as a multiple of the mean assignments per expert; None: dropless.
        per_sequence: True: each sequence has its own capacity, so that no drop depends on the layout of ranks; False:
            in training, all tokens of a rank's micro-batch share one. Evaluation, where a batch may be filled up with
            padding, always takes each sequence.
        policy: probability: assignments with the lowest gates are dropped; position: those of the last tokens.
    """

    factor: float | None = None
    eval_factor: float | None = None
    per_sequence: bool = True
    policy: Literal["probability", "position"] = "probability"

    def apply(self, routing: Routing, num_sequences: int, training: bool) -> Routing:
        """Mark the assignments that fit, and count those that are dropped.

        Args:
            routing: Decision of the router.
            num_sequences: Number of sequences that the T tokens form.
            training: True: the factor of training counts; False: that of evaluation.
        """
        factor = self.factor if training else self.eval_factor
        num_tokens, top_k = routing.experts_TK.shape
        num_experts = routing.logits_TE.shape[1]
        scopes = num_sequences if self.per_sequence or not training else 1
        if factor is None or num_tokens == 0:
            return routing
        capacity = expert_capacity(num_tokens // scopes, top_k, num_experts, factor)
        if capacity >= num_tokens // scopes:  # a token chooses an expert at most once
            return routing
        priority_TK = routing.gates_TK if self.policy == "probability" else None
        kept_TK = within_capacity(routing.experts_TK, priority_TK, num_experts, capacity, scopes)
        dropped_E = torch.zeros_like(routing.sums.counts)
        dropped_E.scatter_add_(0, routing.experts_TK.reshape(-1), (~kept_TK).reshape(-1).to(torch.int64))
        return replace(routing, kept_TK=kept_TK, sums=replace(routing.sums, dropped=dropped_E))


NO_LIMIT = CapacityLimit()
