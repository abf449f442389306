"""Learning rate as a function of the step alone, so that resuming needs no state."""

import math

from moe_train.config.run import OptimConfig


def learning_rate(step: int, num_steps: int, optim: OptimConfig) -> float:
    """Compute the learning rate of a step.

    Args:
        step: Optimizer step, from 0.
        num_steps: Number of steps of the whole run.
        optim: Peak, warm-up and shape of the schedule.

    Returns:
        The learning rate. In warm-up, it rises linearly from peak / warmup_steps to the peak. Then it is constant, or
        falls to min_learning_rate_ratio * peak at the last step: like a cosine, or linearly over the last steps (wsd).
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
