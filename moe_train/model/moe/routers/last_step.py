"""What routers remember of the last optimizer step: sums over all its tokens, for balance losses over whole steps.

They are buffers of each router: the same on every rank, saved in checkpoints, left alone by a step that is skipped.
Legend: L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_train.model.moe.steps import RoutingSums

REMEMBERED = ("importance", "load", "share")
_PREFIX, _KNOWN = "balance_", "balance_known"
LAST_STEP_BUFFERS = (*(f"{_PREFIX}{name}" for name in REMEMBERED), _KNOWN)


def is_remembered(name: str) -> bool:
    """Whether a buffer, by its name in the model, is one that a checkpoint need not have."""
    return name.rpartition(".")[2] in LAST_STEP_BUFFERS


def add_buffers(router: nn.Module, num_experts: int, names: frozenset[str]) -> None:
    """Give a router buffers for some sums; their values are zero, and so is the flag that says whether they are known.

    Args:
        router: The router.
        num_experts: E.
        names: Names of sums, of REMEMBERED.
    """
    for name in REMEMBERED:
        if name in names:
            router.register_buffer(f"{_PREFIX}{name}", torch.zeros(num_experts))
    if names:
        router.register_buffer(_KNOWN, torch.zeros(1))


@dataclass(frozen=True)
class LastStep:
    """Sums of the last step that was taken, over all ranks and micro-batches, per token.

    Attributes:
        known_L: fp32, 1 where the sums are known, 0 before the first step and after an import.
        importance_LE: fp32, importance per token; zeros where nobody needs it, as the others.
        load_LE: fp32, load per token.
        share_LE: fp32, share of the assignments.
    """

    known_L: Tensor
    importance_LE: Tensor
    load_LE: Tensor
    share_LE: Tensor

    @staticmethod
    def of(routers: Sequence[nn.Module], num_experts: int, device: torch.device) -> "LastStep":
        """Read the routers' buffers."""

        def stacked(name: str, width: int) -> Tensor:
            nothing = torch.zeros(width, device=device)
            return torch.stack([getattr(router, name, nothing) for router in routers])

        known_L = stacked(_KNOWN, 1)[:, 0]
        return LastStep(known_L, *(stacked(f"{_PREFIX}{name}", num_experts) for name in REMEMBERED))


def remember(routers: Sequence[nn.Module], sums: RoutingSums, num_tokens: int) -> None:
    """Write the sums of a step that was taken into the routers' buffers.

    Args:
        routers: Routers of all MoE layers.
        sums: [L, ...] sums over all ranks and micro-batches of the step.
        num_tokens: Tokens of the step.
    """
    values = {
        "importance": sums.importance / num_tokens,
        "load": sums.load / num_tokens,
        "share": sums.counts / sums.counts.sum(-1, keepdim=True).clamp(min=1),
    }
    for layer, router in enumerate(routers):
        for name, values_LE in values.items():
            buffer = getattr(router, f"{_PREFIX}{name}", None)
            if buffer is not None:
                buffer.copy_(values_LE[layer])
        if hasattr(router, _KNOWN):
            getattr(router, _KNOWN).fill_(1.0)
