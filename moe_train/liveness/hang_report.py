"""The end of a process that cannot go on: a report of where it is, time for other ranks to write theirs, an exit code.

A thread that waits in a collective cannot be interrupted, so that the process is ended from beside it.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TextIO

from moe_train.config.errors import EXIT_LOST
from moe_train.distributed.flight_recorder import FlightRecorder

GRACE_SECONDS = 2.5  # a launcher ends all ranks when the first is gone; by then they have written their reports


class Reporter:
    """Writes the report of this rank, once, whoever asks first, and ends the process.

    Args:
        rank: Of this process.
        flight_recorder: Where it is.
        streams: Files to write to, such as the rank's log and the error stream.
        exit_process: What ends the process.
        grace_seconds: Between report and end.
    """

    def __init__(
        self,
        rank: int,
        flight_recorder: FlightRecorder,
        streams: Sequence[TextIO],
        exit_process: Callable[[int], object] = os._exit,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self.rank, self.flight_recorder = rank, flight_recorder
        self._streams, self._exit, self._grace = list(streams), exit_process, grace_seconds
        self._lock = threading.Lock()
        self._is_ending = False

    def end(self, reason: str) -> None:
        """Write a report and end the process with EXIT_LOST; returns at once where another thread is at it.

        Args:
            reason: Why, to follow "rank N: ".
        """
        with self._lock:
            if self._is_ending:
                return
            self._is_ending = True
        self.write(reason)
        time.sleep(self._grace)
        self._exit(EXIT_LOST)

    def write(self, reason: str) -> None:
        """Write a report: the reason, what the flight recorder knows, and the Python stacks of all threads."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        text = f"\n{now} rank {self.rank}: {reason}\nrank {self.rank} is at {self.flight_recorder.describe()}\n"
        for stream in self._streams:
            _write(stream, text)

    def wait_for_end(self) -> None:
        """Where another thread is ending the process: let it, and do not return. Else do nothing.

        For a thread that meets an error meanwhile, such as that of a rank that ended first.
        """
        with self._lock:
            is_ending = self._is_ending
        if is_ending:
            time.sleep(self._grace + 1)
            self._exit(EXIT_LOST)


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
        faulthandler.dump_traceback(file=stream, all_threads=True)
    except (OSError, ValueError):  # a full disk or closed stream: the process is to end all the same
        return
