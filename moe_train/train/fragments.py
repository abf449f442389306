"""A rank's part of the training state: flat ranges of logical tensors."""

from dataclasses import dataclass

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


def squares_and_faults(values: Tensor) -> Tensor:
    """Sum of the squares of finite values, and number of the others. fp64 [2], on the CPU."""
    is_finite = torch.isfinite(values)
    squares = torch.where(is_finite, values, 0).double().square().sum()
    return torch.stack((squares, (~is_finite).sum().double())).cpu()
