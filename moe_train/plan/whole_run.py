"""A run to a number of tokens, by a plan: steps, hours and GPU-hours, and the size of its checkpoints."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moe_train.config.run import CheckpointConfig
from moe_train.plan.planner import Plan
from moe_train.plan.states import state_elements

_FP32_BYTES = 4  # a checkpoint has fp32 master weights and moments, whatever the precision of the run


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run.

    Attributes:
        num_bytes: Size of one: master weights and the optimizer's moments of all ranks.
        num_kept: Number of checkpoints that are there when the run ends.
        has_spare: Whether there is one more while it is written: an old one is removed after a newer one is complete.
    """

    num_bytes: int
    num_kept: int
    has_spare: bool

    @property
    def kept_bytes(self) -> int:
        """Bytes of the checkpoints that are there when the run ends."""
        return self.num_kept * self.num_bytes

    @property
    def most_bytes(self) -> int:
        """Bytes on the disk at its fullest, while the last checkpoint is written."""
        return (self.num_kept + self.has_spare) * self.num_bytes


@dataclass(frozen=True)
class WholeRun:
    """A run to a number of tokens.

    Attributes:
        tokens: Tokens to train on, as asked.
        steps: Steps in which at least as many are read.
        seconds: Time of all steps; validation, restarts and saves that training waits for come on top.
        num_gpus: Number of ranks.
        tokens_per_second: Tokens per second of all ranks.
        checkpoints: Its checkpoints.
    """

    tokens: int
    steps: int
    seconds: float
    num_gpus: int
    tokens_per_second: float
    checkpoints: Checkpoints

    @property
    def hours(self) -> float:
        """Hours of all steps."""
        return self.seconds / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours of all steps, times the number of ranks."""
        return self.hours * self.num_gpus

    def as_dict(self) -> dict[str, Any]:
        """Return the run as plain values for JSON."""
        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "tokens_per_second": self.tokens_per_second,
            "checkpoint_bytes": self.checkpoints.num_bytes,
            "checkpoints_kept": self.checkpoints.num_kept,
            "checkpoints_kept_bytes": self.checkpoints.kept_bytes,
            "checkpoints_most_bytes": self.checkpoints.most_bytes,
        }


def plan_run(plan: Plan, tokens: int) -> WholeRun:
    """Extend a plan of a step to a run; train.steps of the configuration plays no part.

    Args:
        plan: Plan of the configuration.
        tokens: Tokens to train on, over all ranks.
    """
    tokens_of_step = plan.config.train.global_batch_size * plan.layout.sequence_length
    steps = math.ceil(tokens / tokens_of_step)
    num_bytes = _FP32_BYTES * state_elements(plan.shape, plan.layout)
    return WholeRun(
        tokens,
        steps,
        steps * plan.step.seconds,
        plan.layout.world_size,
        plan.tokens_per_second,
        _checkpoints(plan.config.checkpoint, steps, plan.step.seconds, num_bytes),
    )


def _checkpoints(settings: CheckpointConfig, steps: int, seconds: float, num_bytes: int) -> Checkpoints:
    """Count the checkpoints that retention leaves: the last ones, and older ones of every so many steps."""
    newest = list(itertools.islice(_saves(settings, steps, seconds), settings.keep_last + 1))
    last = newest[: settings.keep_last]
    older = (last[-1] - 1) // settings.keep_every if settings.keep_every else 0
    # The last save removes one, unless that is kept too.
    removes = newest[settings.keep_last :]
    has_spare = bool(removes) and not (settings.keep_every and removes[0] % settings.keep_every == 0)
    return Checkpoints(num_bytes, len(last) + older, has_spare)


def _saves(settings: CheckpointConfig, steps: int, seconds: float) -> Iterator[int]:
    """Yield the steps after which a run saves, the last one first."""
    # Time is counted from the last save, so that it begins anew at each save that a number of steps causes.
    pause = max(1, math.ceil(60 * settings.every_minutes / seconds)) if settings.every_minutes else 0
    block = settings.every or steps
    yield steps
    for start in range((steps - 1) // block * block, -1, -block):
        if pause:
            end = min(start + block, steps)
            yield from range(start + (end - 1 - start) // pause * pause, start, -pause)
        if start:
            yield start
