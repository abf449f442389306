"""DeepSpeed's own way of the gradients, beside which the short way and offload are held."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch


class LongWay:
    """In place of DirectGradients: DeepSpeed moves the gradients."""

    def __init__(self, zero: Any) -> None:
        del zero

    def divisor(self, group: int) -> float:
        return 1.0


@contextlib.contextmanager
def long_way() -> Iterator[None]:
    """Engines that are made in the block have DeepSpeed's way."""
    with patch("moe_train.train.engine.engine.DirectGradients", LongWay):
        yield
