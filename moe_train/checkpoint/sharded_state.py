"""A rank's part of the training state as checkpoints see it: flat ranges of logical tensors, whoever holds them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_train.model.parameters import LogicalTensor

STATE_KINDS = ("weight", "exp_avg", "exp_avg_sq")  # fp32 master weight and Adam's moments


@dataclass(frozen=True)
class Fragment:
    """A flat range of a logical tensor that this rank alone owns, with its optimizer state: views, not copies.

    Attributes:
        tensor: The logical tensor.
        start: First element of the range in the flattened global tensor.
        numel: Elements of the range.
        states: fp32, 1-D, by the names of STATE_KINDS.
    """

    tensor: LogicalTensor
    start: int
    numel: int
    states: dict[str, Tensor]


class ShardedState(Protocol):
    """The training state of all ranks together. Checkpoints read and write it through this alone."""

    @property
    def logical_tensors(self) -> Sequence[LogicalTensor]:
        """Every tensor of the model as all ranks together see it."""

    @property
    def optimizer_step(self) -> int:
        """Updates that the optimizer has made."""

    @property
    def loss_scale(self) -> float:
        """Loss scale of fp16; 1 in another precision."""

    def fragments(self) -> Iterator[Fragment]:
        """The ranges that this rank owns; every element of the model has one owner."""

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers by name, the same on every rank."""

    def read_state(self, read: Callable[[Fragment, str], Tensor]) -> None:
        """Replace this rank's fragments by what `read(fragment, kind)` gives, 1-D fp32; `adopt_state` must follow."""

    def adopt_state(self, optimizer_step: int, loss_scale: float | None) -> None:
        """Continue from the state that `read_state` replaced. Collective: all ranks."""


def squares_and_faults(values: Tensor) -> Tensor:
    """Sum of the squares of finite values, and number of the others. fp64 [2], on the CPU."""
    is_finite = torch.isfinite(values)
    squares = torch.where(is_finite, values, 0).double().square().sum()
    return torch.stack((squares, (~is_finite).sum().double())).cpu()
