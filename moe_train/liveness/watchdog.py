"""Watchdog for steps that do not end."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from moe_train.liveness.hang_report import Reporter

_MOST_COUNTED = 2.0  # longest time between two polls: a stop of the whole process (SIGSTOP, suspend) is not a hang


class Watchdog:
    """Thread that writes a report and ends the process if a watched block takes too long.

    Args:
        timeout_seconds: Longest time for one block.
        reporter: Writes where the process is, and ends it.
        culprit: Returns a clause about the rank to blame, or None if unknown; it must not wait.
        clock: Returns seconds that never go back.
    """

    def __init__(
        self,
        timeout_seconds: float,
        reporter: Reporter,
        culprit: Callable[[], str | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout, self._reporter, self._culprit, self._clock = timeout_seconds, reporter, culprit, clock
        self._look_seconds = min(0.5, timeout_seconds / 10)
        self._name, self._num_blocks = "", 0
        # Number of the watched block; 0 outside of a block. One thread writes it by atomic assignments: no lock.
        self._block = 0
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stopped.set()

    @contextlib.contextmanager
    def watching(self, name: str = "the step") -> Iterator[None]:
        """Watch the block, which must end in time. Each block has the full time; blocks must not be nested.

        Args:
            name: Name of the block in the report.
        """
        self._num_blocks += 1
        self._name = name
        self._block = self._num_blocks
        try:
            yield
        finally:
            self._block = 0

    def _run(self) -> None:
        block, seconds, looked = 0, 0.0, self._clock()
        while not self._stopped.wait(self._look_seconds):
            now, current = self._clock(), self._block
            passed, looked = min(now - looked, _MOST_COUNTED), now
            if current != block:
                block, seconds = current, 0.0
            elif current != 0:
                seconds += passed
            if block != 0 and seconds >= self._timeout:
                self._reporter.end(self._describe())
                return

    def _describe(self) -> str:
        text = f"{self._name} has not ended within {self._timeout:g} s"
        found = self._culprit() if self._culprit is not None else None
        return f"{text}; {found}" if found is not None else text
