"""Signals that ask a run to stop: the first lets it finish its step and save, a second ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher hands on what it gets, as SIGTERM: Ctrl-C reaches a rank as SIGINT from the terminal and soon after as
# SIGTERM from its launcher. Slurm may send the same signal to a task twice at once.
_OTHER_ECHO_SECONDS = 2.0
_SAME_ECHO_SECONDS = 0.1


class StopSignals:
    """Notes the first stop signal while its block runs.

    A thread reads the signals from a pipe that the interpreter's C handler writes to, so that a second one ends the
    process also while the main thread waits in a collective operation.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        end: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        Args:
            say: Told about each signal, from another thread.
            end: Ends the process with an exit code.
            clock: Seconds.
        """
        self._say, self._end, self._clock = say, end, clock
        self._first: tuple[signal.Signals, float] | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._write = -1
        self._is_leaving = False

    @property
    def received(self) -> signal.Signals | None:
        """The first signal, or None."""
        return self._first[0] if self._first is not None else None

    def ignore(self) -> None:
        """Take no signal seriously any more, also after the block: this rank leaves with its exit code.

        A launcher that sees one rank go ends the others, which are about to go too.
        """
        self._is_leaving = True

    def __enter__(self) -> Self:
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # The C handler writes to the pipe only where there is a Python handler too.
        self._before = {number: signal.signal(number, _do_nothing) for number in SIGNALS}
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(read,), name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._is_leaving else handler)
        os.close(self._write)  # the thread ends

    def _read(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._take(signal.Signals(number))
        os.close(pipe)

    def _take(self, received: signal.Signals) -> None:
        now = self._clock()
        if self._first is None:
            self._first = received, now
            self._say(f"{received.name}: this step is finished and saved, then the run stops; a second ends it at once")
            return
        first, when = self._first
        if self._is_leaving:
            return
        if now - when < (_SAME_ECHO_SECONDS if received == first else _OTHER_ECHO_SECONDS):
            return
        self._say(f"{received.name} after {first.name}: ended at once, without saving")
        self._end(128 + received)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A Python handler, so that the interpreter's own is in place."""
