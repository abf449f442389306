"""Results of an optimizer step: after the gradients, before the update; and after the update."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moe_train.model.moe.steps import RoutingSums


@dataclass(frozen=True)
class Gradients:
    """Results of a step between its gradients and its update.

    Attributes:
        loss: Mean over this rank's micro-batches of the total loss; fp32 scalar on the device.
        grad_norm: Global norm of the averaged gradient before clipping, the same on all ranks; negative or not finite
            if a gradient is not finite; scalar on the device.
        overflowed: Whether fp16's loss scale was too large for the step, which is no fault.
    """

    loss: Tensor
    grad_norm: Tensor
    overflowed: bool


SkipRule = Callable[[Gradients], bool]  # whether to skip the update: the same answer on all ranks


@dataclass(frozen=True)
class StepResult:
    """Results of one optimizer step on this rank.

    Attributes:
        loss: Mean over micro-batches of the total loss; fp32 scalar on the device.
        cross_entropy: Mean over micro-batches of the cross-entropy, nats per token; fp32 scalar on the device.
        sums: Routing sums over the micro-batches, [L, ...]; None without MoE layers.
        grad_norm: Global norm of the averaged gradient before clipping, the same on all ranks; scalar.
        skipped: Whether the update was skipped, by fp16's loss scaler or by step control.
        loss_scale: fp16's loss scale; 1 otherwise.
    """

    loss: Tensor
    cross_entropy: Tensor
    sums: RoutingSums | None
    grad_norm: Tensor
    skipped: bool
    loss_scale: float = 1.0
