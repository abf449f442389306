"""An optimizer: stochastic gradient descent with momentum."""

from typing import Any

import torch
from pydantic import Field

from moe_train.config.base import Section
from moe_train.config.run import OptimConfig
from moe_train.train.engine.optimizers.base import OptimizerKind


class SgdConfig(Section):
    """Settings of the optimizer."""

    momentum: float = Field(0.9, gt=0.0, lt=1.0)
    """Decay rate of the momentum."""


def _build(groups: list[dict[str, Any]], optim: OptimConfig, section: SgdConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=optim.learning_rate, momentum=section.momentum)


KIND = OptimizerKind(_build, moments=("momentum_buffer",), counts_steps=False, section=SgdConfig)
