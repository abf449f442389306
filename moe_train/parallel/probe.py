"""What is told about a layer's all-to-alls: what they cost, and that this process is in one."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.parallel.position import Exchange, Position
from moe_train.parallel.traffic import TrafficMeter


@dataclass(frozen=True)
class Probe:
    """The handle of one layer.

    Attributes:
        meter: Told what an all-to-all costs; None: nobody asks.
        position: Told that one begins and ends; None: nobody asks.
        layer: Of the model; None: none.
    """

    meter: TrafficMeter | None = None
    position: Position | None = None
    layer: int | None = None

    @contextlib.contextmanager
    def starting(self, exchange: Exchange, num_bytes: int) -> Iterator[None]:
        """The block starts an all-to-all. Never waits for the device.

        Args:
            exchange: The all-to-all.
            num_bytes: That this rank sends to others.
        """
        if self.position is not None:
            self.position.start(exchange)
        with self._measured(num_bytes):
            yield

    @contextlib.contextmanager
    def waiting(self, exchange: Exchange) -> Iterator[None]:
        """The block waits for an all-to-all that was started.

        After an error in the block the note stays: the position tells where communication failed.

        Args:
            exchange: The all-to-all.
        """
        if self.position is not None:
            self.position.begin(exchange)
        with self._measured(0):
            yield
        if self.position is not None:
            self.position.end()

    def _measured(self, num_bytes: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.meter is None else self.meter.measure(num_bytes)


UNOBSERVED = Probe()
