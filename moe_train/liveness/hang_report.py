"""End of a process that cannot continue: it reports where it is, lets other ranks report too, and exits.

A thread that waits in a collective cannot be interrupted. So another thread ends the process.
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

GRACE_SECONDS = 2.5  # a launcher ends all ranks when the first exits; until then they can write their reports


class Reporter:
    """Writer of this rank's report. It writes once, for the first caller, and then ends the process.

    Args:
        rank: Rank of this process.
        flight_recorder: Recorder that knows where this process is.
        streams: Files for the report, such as the rank's log and the error stream.
        exit_process: Called with the exit code; ends the process.
        grace_seconds: Time between the report and the exit.
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
        """Write a report and end the process with EXIT_LOST; return at once if another thread does so already.

        Args:
            reason: Reason of the end, to follow "rank N: ".
        """
        with self._lock:
            if self._is_ending:
                return
            self._is_ending = True
        self.write(reason)
        time.sleep(self._grace)
        self._exit(EXIT_LOST)

    def write(self, reason: str) -> None:
        """Write a report: the reason, what the flight recorder knows, and the Python stacks of all threads.

        Args:
            reason: Reason of the report, to follow "rank N: ".
        """
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        text = f"\n{now} rank {self.rank}: {reason}\nrank {self.rank} is at {self.flight_recorder.describe()}\n"
        for stream in self._streams:
            _write(stream, text)

    def wait_for_end(self) -> None:
        """Do not return if another thread is ending the process; otherwise do nothing.

        A thread calls this after an error that may come from the end of another rank.
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
    except (OSError, ValueError):  # the disk is full or the stream closed: the process must end all the same
        return
