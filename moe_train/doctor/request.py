"""What one rank is asked to examine."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moe_train.distributed.world import World
from moe_train.doctor.facts import Facts
from moe_train.host.precision import Precision


@dataclass(frozen=True)
class Request:
    """What to examine.

    Attributes:
        world: The place of this process.
        device: Of this rank.
        facts: Of this rank.
        precisions: Of products; fp32 and what training would use.
        sizes: Bytes of collective operations, ascending.
        budget_seconds: Of the operations of one scope, and of the products of one precision.
        timeout_seconds: After which a link counts as broken, or a rank as hanging.
        expected: Bytes a second between two hosts that the user expects; None.
        folder: That all ranks should share; None: not known.
        unwritable: Why the report cannot be written to its file; "". Of rank 0 alone.
    """

    world: World
    device: torch.device
    facts: Facts
    precisions: tuple[Precision, ...]
    sizes: tuple[int, ...]
    budget_seconds: float
    timeout_seconds: float
    expected: float | None
    folder: Path | None
    unwritable: str
