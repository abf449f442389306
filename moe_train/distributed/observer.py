"""Observer of a layer's all-to-alls: it measures their cost, and notes that this process is in one."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.distributed.flight_recorder import CollectiveRecord, FlightRecorder
from moe_train.distributed.traffic import TrafficMeter


@dataclass(frozen=True)
class CommObserver:
    """Observer of the all-to-alls of one layer.

    Attributes:
        meter: Meter that adds up time and bytes; None: no measurement.
        flight_recorder: Recorder that notes each begin and end; None: no notes.
        layer: Index of the model's layer; None: no layer.
    """

    meter: TrafficMeter | None = None
    flight_recorder: FlightRecorder | None = None
    layer: int | None = None

    @contextlib.contextmanager
    def starting(self, collective: CollectiveRecord, num_bytes: int) -> Iterator[None]:
        """Observe the block, which starts an all-to-all. This never waits for the device.

        Args:
            collective: Record of the all-to-all.
            num_bytes: Bytes that this rank sends to other ranks.
        """
        if self.flight_recorder is not None:
            self.flight_recorder.start(collective)
        with self._measured(num_bytes):
            yield

    @contextlib.contextmanager
    def waiting(self, collective: CollectiveRecord) -> Iterator[None]:
        """Observe the block, which waits for an all-to-all that was started.

        After an error in the block the note stays, so that the flight recorder shows where communication failed.

        Args:
            collective: Record of the all-to-all.
        """
        if self.flight_recorder is not None:
            self.flight_recorder.begin(collective)
        with self._measured(0):
            yield
        if self.flight_recorder is not None:
            self.flight_recorder.end()

    def _measured(self, num_bytes: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.meter is None else self.meter.measure(num_bytes)


UNOBSERVED = CommObserver()
