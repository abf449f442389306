"""Interface of optimizers for the engine, the checkpoint and the planner.

Legend: N stacked entries, M matrices side by side in each, A rows, B columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_train.config.base import Section
from moe_train.config.run import OptimConfig


@dataclass(frozen=True)
class FlatPart:
    """Place of a parameter that is one or more matrices in a flat partition of ZeRO.

    Attributes:
        shape: Shape of the parameter on this rank: [A, M B] or [M A, B] of a linear map, [N, A, M B] of experts.
        stacked: N, experts of this rank; 1 for a linear map.
        beside: M, maps that are stored side by side along the outputs, such as gate and up.
        start: Place in the flattened parameter at which this rank's range begins.
        offset: Place in the flat partition at which the range begins.
        numel: Elements of the range; 0: other ranks have all of the parameter.
    """

    shape: tuple[int, ...]
    stacked: int
    beside: int
    start: int
    offset: int
    numel: int

    @property
    def whole_numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """A and B."""
        if len(self.shape) == 3:  # experts: the outputs are the last dimension
            return self.shape[1], self.shape[2] // self.beside
        return self.shape[0] // self.beside, self.shape[1]

    def split(self, flat: Tensor) -> Tensor:
        """View the flattened parameter as its matrices, [N, M, A, B]."""
        rows, columns = self.matrix_shape
        if len(self.shape) == 3:
            return flat.view(self.stacked, rows, self.beside, columns).transpose(1, 2)
        return flat.view(1, self.beside, rows, columns)


@dataclass(frozen=True)
class OptimizerKind:
    """Description of a kind of optimizer.

    It updates each flat fp32 partition of ZeRO, and keys its state by the partition: element by element, or, if it has
    `matrix_moments`, matrices as a whole. Then the parameters that are matrices have partitions of their own
    ("is_matrix" in their group), and its optimizer has a method `bind`, which is told before the first step where they
    lie (`optimizers.muon.Muon.bind`).

    Attributes:
        build: Function that makes the optimizer from parameter groups, the optim section and its own section.
        moments: Names of its state tensors, fp32 and as long as the weights. They start at zero, and a checkpoint keeps
            them beside the weights.
        counts_steps: Whether its state has the number of updates, "step", for example for a bias correction.
        fields: Fields among beta1, beta2 and epsilon that it reads; the others are refused if they are changed.
        section: Class of its own settings, written under optim.NAME; None: its settings are fields of optim.
        matrix_moments: Names of the state tensors of matrices, some of `moments`; None: it treats all parameters alike.
        matrix_products: Function that lists the products (m, k, n) of the update of a matrix, from its rows and
            columns; None: there are none.
        bucket_elements: Elements of whole matrices that are in memory at a time, beside as many of updates.
    """

    build: Callable[[list[dict[str, Any]], OptimConfig, Any], torch.optim.Optimizer]
    moments: tuple[str, ...]
    counts_steps: bool = True
    fields: frozenset[str] = frozenset()
    section: type[Section] | None = None
    matrix_moments: tuple[str, ...] | None = None
    matrix_products: Callable[[int, int], list[tuple[int, int, int]]] | None = None
    bucket_elements: int = 1

    @property
    def works_on_host(self) -> bool:
        """Whether the update can be made in the memory of the host; one of whole matrices needs the devices."""
        return self.matrix_moments is None

    def moments_of(self, is_matrix: bool) -> tuple[str, ...]:
        """Return the names of the state tensors of a parameter that is, or is not, made of matrices."""
        return self.matrix_moments if is_matrix and self.matrix_moments is not None else self.moments

    def new_state(self, flat: Tensor, is_matrix: bool = False) -> dict[str, Tensor]:
        """Make the state of a flat partition before the first update."""
        names = self.moments_of(is_matrix)
        state = {name: torch.zeros_like(flat, memory_format=torch.preserve_format) for name in names}
        if self.counts_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        return state
