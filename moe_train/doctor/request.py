"""Request to the doctor: what one rank examines, and how long it may take."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moe_train.distributed.world import World
from moe_train.doctor.facts import Facts
from moe_train.host.precision import Precision


@dataclass(frozen=True)
class Request:
    """What one rank examines.

    Attributes:
        world: Place of this process among the ranks.
        device: Device of this rank.
        facts: Facts of this rank.
        precisions: Precisions of matrix products: fp32, and what training would use.
        sizes: Buffer sizes of collective operations in bytes, ascending.
        budget_seconds: Time for the operations of one scope, and for the products of one precision.
        timeout_seconds: Time after which a link counts as broken, or a rank as hanging.
        expected: Bytes per second that the user expects between two hosts; None: no expectation.
        folder: Folder that all ranks should share; None: not known.
        unwritable: Reason why rank 0 cannot write the report to its file; "" if it can, and on other ranks.
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
