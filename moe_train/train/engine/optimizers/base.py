"""Interface of optimizers for the engine, the checkpoint and the planner."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_train.config.base import Section
from moe_train.config.run import OptimConfig


@dataclass(frozen=True)
class OptimizerKind:
    """Description of a kind of optimizer.

    It updates each flat fp32 partition of ZeRO element by element, and keys its state by the partition.

    Attributes:
        build: Function that makes the optimizer from parameter groups, the optim section and its own section.
        moments: Names of its state tensors, fp32 and as long as the weights. They start at zero, and a checkpoint keeps
            them beside the weights.
        counts_steps: Whether its state has the number of updates, "step", for example for a bias correction.
        fields: Fields among beta1, beta2 and epsilon that it reads; the others are refused if they are changed.
        section: Class of its own settings, written under optim.NAME; None: its settings are fields of optim.
    """

    build: Callable[[list[dict[str, Any]], OptimConfig, Any], torch.optim.Optimizer]
    moments: tuple[str, ...]
    counts_steps: bool = True
    fields: frozenset[str] = frozenset()
    section: type[Section] | None = None

    def new_state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Make the state of a flat partition before the first update."""
        state = {name: torch.zeros_like(flat, memory_format=torch.preserve_format) for name in self.moments}
        if self.counts_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        return state
