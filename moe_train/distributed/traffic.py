"""Cost of all-to-alls: the time that a rank spends in them, and the bytes that it sends to other ranks."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_MOST_PENDING = 1024  # event pairs kept; beyond it, the oldest pair is read if it has happened, without waiting


@dataclass(frozen=True)
class Traffic:
    """Time and bytes of this rank's all-to-alls.

    Attributes:
        seconds: Time to start all-to-alls and to wait for their rows, including waits for other ranks. It is the time
            that no other work hides.
        num_bytes: Bytes sent to other ranks.
    """

    seconds: float
    num_bytes: int


class TrafficMeter:
    """Meter that adds up the all-to-alls of counted blocks: training steps, but not validation or generation.

    On CUDA, events on the stream take the times, and `read` reads them. So the meter itself never makes the host wait
    while it counts.

    Args:
        device: Device of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._uses_events = device.type == "cuda"
        self._is_counting = False
        self._seconds, self._num_bytes = 0.0, 0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count all-to-alls while the block runs."""
        self._is_counting = True
        try:
            yield
        finally:
            self._is_counting = False

    @contextlib.contextmanager
    def measure(self, num_bytes: int) -> Iterator[None]:
        """Measure the block, which starts an all-to-all or waits for one.

        Args:
            num_bytes: Bytes that this rank sends to other ranks; 0 for a wait.
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
        """Return what was counted since the last reset. Host synchronisation on CUDA: all events must have happened."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._take_oldest()
        return Traffic(self._seconds, self._num_bytes)

    def _take_oldest(self) -> None:
        begin, end = self._pending.popleft()
        self._seconds += begin.elapsed_time(end) / 1e3  # milliseconds

    def reset(self) -> None:
        """Set the counts to zero."""
        self._seconds, self._num_bytes = 0.0, 0
        self._pending.clear()
