"""What a step tells: sums reduced over ranks, ratios formed once, and written to metrics.jsonl and TensorBoard.

This is the one door to TensorBoard.
Legend: L MoE layers, E experts.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from moe_train.model.moe.balance import cv_squared
from moe_train.model.moe.steps import RoutingSums
from moe_train.parallel.collectives import all_reduce_sum, world_group
from moe_train.train.engine import StepResult
from moe_train.train.records import Record, drop_records_from


@dataclass(frozen=True)
class GlobalStep:
    """One step over all ranks.

    Attributes:
        loss: Mean total loss.
        cross_entropy: Mean cross-entropy, nats a token.
        grad_norm: Global gradient norm before clipping.
        sums: Routing sums over all ranks and micro-batches, fp64 [L, E] on the CPU, or None without MoE layers.
    """

    loss: float
    cross_entropy: float
    grad_norm: float
    sums: RoutingSums | None


def reduce_step(result: StepResult, world_size: int) -> GlobalStep:
    """Add a step's sums up over ranks, in one packed all-reduce. Collective: all ranks."""
    parts = [result.loss.double().reshape(1) / world_size, result.cross_entropy.double().reshape(1) / world_size]
    if result.sums is not None:
        parts += [part.double().reshape(-1) for part in result.sums.tensors]
    # Host synchronisation: the numbers are to be shown. fp64 holds counts exactly.
    packed = all_reduce_sum(torch.cat(parts), world_group()).cpu()
    routing = None
    if result.sums is not None:
        routing = RoutingSums(*packed[2:].view(-1, *result.sums.counts.shape).unbind(0))
    return GlobalStep(float(packed[0]), float(packed[1]), float(result.grad_norm), routing)


def max_violation(counts: Tensor) -> Tensor:
    """MaxVio = max(c) / mean(c) - 1 over the last dimension (Wang et al. 2024, arXiv 2408.15664). [..., E] -> [...]."""
    return counts.amax(-1) / counts.mean(-1).clamp(min=torch.finfo(counts.dtype).tiny) - 1.0


def routing_record(sums: RoutingSums, layers: Sequence[int]) -> Record:
    """Balance figures of each MoE layer and of the worst one, and the counts.

    Args:
        sums: Global sums, fp64 [L, E].
        layers: Index of each MoE layer in the model.
    """
    per_layer = {
        "moe/importance_cv2": cv_squared(sums.importance),
        "moe/load_cv2": cv_squared(sums.load),
        "moe/max_violation": max_violation(sums.counts),
    }
    record: Record = {name: float(values.max()) for name, values in per_layer.items()}
    for name, values in per_layer.items():
        record |= {f"{name}/layer_{i:02d}": value for i, value in zip(layers, values.tolist(), strict=True)}
    counts = sums.counts.long().tolist()
    return record | {f"moe/counts/layer_{i:02d}": row for i, row in zip(layers, counts, strict=True)}


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class MetricsWriter:
    """Appends records to metrics.jsonl and, if wanted, to TensorBoard: the same names and values."""

    def __init__(self, run_dir: Path, first_step: int, use_tensorboard: bool) -> None:
        """Open the run's records; those of steps from first_step on are dropped, for they are made again."""
        self._path = run_dir / "metrics.jsonl"
        drop_records_from(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = None
        if use_tensorboard:
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, record: Record) -> None:
        """Write one record: numbers are scalars in TensorBoard, lists are in metrics.jsonl alone.

        JSON has no infinity, which fp16's gradient norm is where its scale was too large: it becomes null.
        """
        finite = {name: None if _is_not_finite(value) else value for name, value in record.items()}
        self._file.write(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def write_text(self, name: str, text: str) -> None:
        """Show a text in TensorBoard."""
        if self._board is not None:
            self._board.add_text(name, text)

    def close(self) -> None:
        """Write what is buffered."""
        self._file.close()
        if self._board is not None:
            self._board.close()
