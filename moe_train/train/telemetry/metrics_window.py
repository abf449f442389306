"""Sums over the steps since the last record: on the device while they run, then over all ranks in one all-reduce.

Legend: L MoE layers, E experts, W ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.distributed.collectives import all_reduce_sum, world_group
from moe_train.distributed.traffic import TrafficMeter
from moe_train.model.moe.steps import RoutingSums
from moe_train.train.step_result import StepResult


@dataclass(frozen=True)
class GlobalWindow:
    """Sums about the experts over several steps and all ranks.

    Attributes:
        num_steps: Number of steps that the window covers.
        sums: Routing sums over all tokens of these steps, fp64 [L, ...] on the CPU.
        rows_LW: Rows that each rank's experts computed, fp64 [L, W].
        all_to_all_seconds: Seconds in which a rank starts all-to-alls and waits for them, mean over ranks and steps.
        all_to_all_bytes: Bytes that ranks sent to each other, sum over ranks, mean over steps.
    """

    num_steps: int
    sums: RoutingSums
    rows_LW: Tensor
    all_to_all_seconds: float
    all_to_all_bytes: float


@dataclass(frozen=True)
class GlobalStep:
    """Figures of one step over all ranks, and the window that ends with it.

    Attributes:
        loss: Mean total loss of the step.
        cross_entropy: Mean cross-entropy of the step, in nats per token.
        grad_norm: Global gradient norm of the step before clipping.
        window: Window of sums about the experts; None: there are no experts, or they are not measured.
    """

    loss: float
    cross_entropy: float
    grad_norm: float
    window: GlobalWindow | None


class StepWindow:
    """Routing sums of this rank over the steps since the last reset. Adding a step waits for nothing."""

    def __init__(self, meter: TrafficMeter) -> None:
        """Start an empty window.

        Args:
            meter: Meter of the same steps' all-to-alls; it is reset with the window.
        """
        self._meter = meter
        self._sums: RoutingSums | None = None
        self._num_steps = 0

    def add(self, result: StepResult) -> None:
        """Add a step to the window."""
        if result.sums is None:
            return
        self._sums = result.sums if self._sums is None else self._sums.plus(result.sums)
        self._num_steps += 1

    def reset(self) -> None:
        """Empty the window."""
        self._sums, self._num_steps = None, 0
        self._meter.reset()

    def reduce(self, result: StepResult, rank: int, world_size: int) -> GlobalStep:
        """Reduce the last step and the window over all ranks, in one all-reduce.

        Args:
            result: Result of the last step.
            rank: Rank of this process.
            world_size: Number of ranks.

        Collective: All ranks.
        """
        return _reduce(result, rank, world_size, self._sums, self._num_steps, self._meter)


def reduce_step(result: StepResult, world_size: int) -> GlobalStep:
    """Reduce a step over all ranks without its experts, in one all-reduce. Collective: all ranks."""
    return _reduce(result, 0, world_size, None, 0, None)


def _reduce(
    result: StepResult, rank: int, world_size: int, sums: RoutingSums | None, num_steps: int, meter: TrafficMeter | None
) -> GlobalStep:
    parts = [result.loss.double().reshape(1) / world_size, result.cross_entropy.double().reshape(1) / world_size]
    if sums is not None and meter is not None:
        traffic = meter.read()
        rows_LW = torch.zeros(len(sums.rows), world_size, dtype=torch.float64, device=result.loss.device)
        rows_LW[:, rank] = sums.rows.double()
        spent = torch.tensor((traffic.seconds / world_size, traffic.num_bytes), dtype=torch.float64)
        parts += [spent.to(result.loss.device), rows_LW.reshape(-1)]
        parts += [part.double().reshape(-1) for part in sums.tensors]
    # Host synchronisation: the numbers are to be shown. fp64 holds counts exactly.
    packed = all_reduce_sum(torch.cat(parts), world_group()).cpu()
    window = None
    if sums is not None:
        shapes = [rows_LW.shape, *(part.shape for part in sums.tensors)]
        pieces = packed[4:].split([shape.numel() for shape in shapes])
        rows, *totals = (piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))
        seconds, num_bytes = (packed[2:4] / num_steps).tolist()
        window = GlobalWindow(num_steps, RoutingSums(*totals), rows, seconds, num_bytes)
    return GlobalStep(float(packed[0]), float(packed[1]), float(result.grad_norm), window)
