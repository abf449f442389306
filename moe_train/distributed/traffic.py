"""What all-to-alls cost: the time a rank spends in them, and the bytes it sends to other ranks."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_MOST_PENDING = 1024  # event pairs kept; older ones that have happened are read, which does not wait


@dataclass(frozen=True)
class Traffic:
    """What this rank's all-to-alls took.

    Attributes:
        seconds: Starting all-to-alls and waiting for their rows, other ranks included: what no other work hides.
        num_bytes: Sent to other ranks.
    """

    seconds: float
    num_bytes: int


class TrafficMeter:
    """Adds up the all-to-alls of the blocks that are counted: training steps, but not validation or generation.

    On CUDA the times are taken by events on the stream and read when they are asked for, so that counting itself never
    makes the host wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._uses_events = device.type == "cuda"
        self._is_counting = False
        self._seconds, self._num_bytes = 0.0, 0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count while the block runs."""
        self._is_counting = True
        try:
            yield
        finally:
            self._is_counting = False

    @contextlib.contextmanager
    def measure(self, num_bytes: int) -> Iterator[None]:
        """The block starts an all-to-all, or waits for it.

        Args:
            num_bytes: That this rank sends to others; 0 for the wait.
        """
        if not self._is_counting:
            yield
            return
        self._num_bytes += num_bytes
        if self._uses_events:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._pending.append((begin, end))
            while len(self._pending) > _MOST_PENDING and self._pending[0][1].query():
                self._take_oldest()
            return
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def read(self) -> Traffic:
        """What was counted since the last reset. Host synchronisation on CUDA: the events have to have happened."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._take_oldest()
        return Traffic(self._seconds, self._num_bytes)

    def _take_oldest(self) -> None:
        begin, end = self._pending.popleft()
        self._seconds += begin.elapsed_time(end) / 1e3  # milliseconds

    def reset(self) -> None:
        """Begin at zero again."""
        self._seconds, self._num_bytes = 0.0, 0
        self._pending.clear()
