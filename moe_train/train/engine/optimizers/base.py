"""What an optimizer is to the engine, the checkpoint and the planner."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_train.config.base import Section
from moe_train.config.run import OptimConfig


@dataclass(frozen=True)
class OptimizerKind:
    """A kind of optimizer, described by itself.

    It updates each flat fp32 partition of ZeRO element by element, and keys its state by the partition.

    Attributes:
        build: Makes the optimizer from parameter groups, the optim section and its own section.
        moments: Names of its state tensors, fp32 and as long as the weights. They are what a checkpoint keeps beside
            the weights, and start at zero.
        counts_steps: Whether its state has the number of updates, "step", as for a bias correction.
        fields: Fields of optim that it reads, of beta1, beta2 and epsilon; another value of the others is refused.
        section: Settings of its own, written under optim.NAME; None: its settings are fields of optim.
    """

    build: Callable[[list[dict[str, Any]], OptimConfig, Any], torch.optim.Optimizer]
    moments: tuple[str, ...]
    counts_steps: bool = True
    fields: frozenset[str] = frozenset()
    section: type[Section] | None = None

    def new_state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a flat partition before the first update."""
        state = {name: torch.zeros_like(flat, memory_format=torch.preserve_format) for name in self.moments}
        if self.counts_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        return state
