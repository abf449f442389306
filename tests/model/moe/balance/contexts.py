"""Contexts of balance losses, for tests."""

import torch
from torch import Tensor

from moe_train.distributed.collectives import Group
from moe_train.model.moe.balance.base import BalanceContext
from moe_train.model.moe.routers.last_step import LastStep
from moe_train.model.moe.steps import RoutingSums
from moe_train.model.step_size import StepSize


def alone(sums: RoutingSums, group: Group | None = None) -> BalanceContext:
    """A step that is one micro-batch of one process, or of the ranks of a group; nothing is known of the last step."""
    layers, experts = sums.counts.shape
    nothing = LastStep(torch.zeros(layers), *(torch.zeros(layers, experts) for _ in range(3)))
    return BalanceContext(StepSize.of_one_part(1), nothing, group)


def after(last: RoutingSums, last_tokens: int, size: StepSize, known: float = 1.0) -> BalanceContext:
    """A step behind another one, whose sums are given."""

    def per_token(values: Tensor) -> Tensor:
        return values.detach() / last_tokens

    share_LE = last.counts / last.counts.sum(-1, keepdim=True)
    known_L = torch.full(last.counts.shape[:1], known)
    return BalanceContext(size, LastStep(known_L, per_token(last.importance), per_token(last.load), share_LE))
