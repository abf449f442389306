"""The learning rate as a function of the step alone, so that resuming needs no state."""

import math

from moe_train.config.run import OptimConfig


def learning_rate(step: int, num_steps: int, optim: OptimConfig) -> float:
    """Learning rate of a step.

    Args:
        step: From 0.
        num_steps: Steps of the whole run.
        optim: Peak, warm-up and shape.

    Returns:
        warm-up: linear from peak / warmup_steps; then cosine or constant to the end, or constant and linear (wsd) down
        to min_learning_rate_ratio * peak at the last step.
    """
    peak = optim.learning_rate
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    lowest = peak * optim.min_learning_rate_ratio
    if optim.schedule == "constant":
        return peak
    if optim.schedule == "wsd":
        decay_steps = max(1, round(optim.decay_fraction * num_steps))
        share = (step - (num_steps - 1 - decay_steps)) / decay_steps
        return peak - (peak - lowest) * min(max(share, 0.0), 1.0)
    share = (step - optim.warmup_steps) / max(1, num_steps - 1 - optim.warmup_steps)
    return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
