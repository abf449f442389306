"""What is told about a layer's all-to-alls: what they cost, and that this process is in one."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_train.parallel.position import Direction, Exchange, Position
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
    def around(
        self, operation: str, direction: Direction, send: Sequence[int], receive: Sequence[int], num_bytes: int
    ) -> Iterator[None]:
        """One all-to-all, which the block runs. Never waits for the device.

        After an error in the block the note stays: the position tells where communication failed.

        Args:
            operation: Its name.
            direction: The pass it belongs to.
            send: Rows for each rank of the group.
            receive: Rows from each rank of the group.
            num_bytes: That this rank sends to others.
        """
        if self.position is not None:
            self.position.begin(Exchange(operation, self.layer, direction, send, receive))
        with self.meter.measure(num_bytes) if self.meter is not None else contextlib.nullcontext():
            yield
        if self.position is not None:
            self.position.end()
