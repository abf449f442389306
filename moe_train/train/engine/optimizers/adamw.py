"""AdamW with decoupled weight decay.

Source: Loshchilov and Hutter 2019, arXiv 1711.05101.
"""

from typing import Any

import torch

from moe_train.config.run import OptimConfig
from moe_train.train.engine.optimizers.base import OptimizerKind


def _build(groups: list[dict[str, Any]], optim: OptimConfig, section: Any) -> torch.optim.Optimizer:
    del section
    return torch.optim.AdamW(
        groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), eps=optim.epsilon, fused=True
    )


ADAMW = OptimizerKind(_build, moments=("exp_avg", "exp_avg_sq"), fields=frozenset({"beta1", "beta2", "epsilon"}))
