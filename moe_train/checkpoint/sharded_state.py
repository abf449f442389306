"""Training state as checkpoints see it: flat ranges of logical tensors, whichever rank holds them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_train.model.parameters import LogicalTensor


@dataclass(frozen=True)
class Fragment:
    """Flat range of a logical tensor that this rank alone owns, with its optimizer state: views, not copies.

    Attributes:
        tensor: The logical tensor.
        start: First element of the range in the flattened global tensor.
        numel: Number of elements of the range.
        states: fp32 master weight under "weight", and the optimizer's moments by name; 1-D.
    """

    tensor: LogicalTensor
    start: int
    numel: int
    states: dict[str, Tensor]


class ShardedState(Protocol):
    """Training state of all ranks together. Checkpoints read and write it only through this protocol."""

    @property
    def logical_tensors(self) -> Sequence[LogicalTensor]:
        """Every tensor of the model as all ranks together see it."""

    @property
    def optimizer(self) -> str:
        """Return the name of the optimizer."""

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the optimizer's state tensors, which are fp32 and as long as the weights."""

    @property
    def optimizer_step(self) -> int:
        """Number of updates that the optimizer has made."""

    @property
    def loss_scale(self) -> float:
        """Loss scale of fp16; 1 in another precision."""

    def fragments(self) -> Iterator[Fragment]:
        """Yield the ranges that this rank owns; every element of the model has one owner."""

    def buffers(self) -> dict[str, Tensor]:
        """Return the model's buffers by name; they are the same on every rank."""

    def read_state(self, read: Callable[[Fragment, str], Tensor]) -> None:
        """Replace this rank's fragments. `adopt_state` must follow.

        Args:
            read: Called with a fragment and a key of its states; returns the values, fp32, 1-D.
        """

    def adopt_state(self, optimizer_step: int, loss_scale: float | None) -> None:
        """Continue from the state that `read_state` has replaced.

        Args:
            optimizer_step: Number of updates that the optimizer has made.
            loss_scale: Loss scale of fp16; None: the checkpoint was not trained in fp16.

        Collective: All ranks.
        """


def squares_and_faults(values: Tensor) -> Tensor:
    """Compute the sum of the squares of finite values, and the number of the other values. fp64 [2], on the CPU."""
    is_finite = torch.isfinite(values)
    squares = torch.where(is_finite, values, 0).double().square().sum()
    return torch.stack((squares, (~is_finite).sum().double())).cpu()
