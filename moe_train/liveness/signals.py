"""Signals that stop a run: in training the first one lets it finish its step and save, a second one ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Self

from moe_train.config.errors import EXIT_STOPPED, RunFailed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher passes on its own signals as SIGTERM. So Ctrl-C reaches a rank as SIGINT from the terminal, and soon after
# as SIGTERM from its launcher. Slurm may send the same signal to a task twice at once.
_OTHER_ECHO_SECONDS = 2.0
_SAME_ECHO_SECONDS = 0.1


class _SignalReader:
    """Reader of stop signals while its block runs: a thread reads them from a pipe, which the C handler writes to.

    So a signal is taken even while the main thread waits in a collective operation or loads a library. Readers can be
    nested: the inner one takes the signals.

    Args:
        numbers: Signals to take.
        take: Called with each signal, from the thread.
    """

    def __init__(self, numbers: Sequence[signal.Signals], take: Callable[[signal.Signals], None]) -> None:
        self._numbers, self._take = numbers, take
        self._before: dict[signal.Signals, Any] = {}
        self._write = self._wakeup_before = -1

    def start(self) -> None:
        """Begin to take signals. Only the main thread can do so."""
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # The C handler writes to the pipe only if a Python handler is set too.
        self._before = {number: signal.signal(number, _do_nothing) for number in self._numbers}
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)  # a notebook has one
        threading.Thread(target=self._read, args=(read,), name="stop signals", daemon=True).start()

    def stop(self, *, ignore: bool) -> None:
        """Put the handlers back as they were; or ignore the signals from now on. What is ignored now stays ignored."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_IGN if ignore else handler)
        os.close(self._write)  # ends the thread

    def _read(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in self._numbers:
                    self._take(signal.Signals(number))
        os.close(pipe)


class EarlyStop:
    """Orderly end at the first stop signal, while there is nothing to save: before training, and after it.

    Args:
        say: Called with a message about the signal, from another thread.
        end: Called with the exit code; ends the process.
    """

    def __init__(self, say: Callable[[str], None], end: Callable[[int], Any] = os._exit) -> None:
        self._say, self._end = say, end
        self._reader: _SignalReader | None = None

    def __enter__(self) -> Self:
        # A process that nohup or a shell's & has started is to ignore some of them.
        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._reader = _SignalReader(numbers, self._take)
        self._reader.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._reader is not None:
            self._reader.stop(ignore=isinstance(error, RunFailed))  # this rank has yet to say why it ends

    def _take(self, received: signal.Signals) -> None:
        self._say(f"{received.name}: ended at once, as no step is under way; the same command goes on from here")
        self._end(EXIT_STOPPED)


class StopSignals:
    """Recorder of the first stop signal that arrives while its block runs; a second signal ends the process."""

    def __init__(
        self,
        say: Callable[[str], None],
        end: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the recorder. It takes effect with its block.

        Args:
            say: Called with a message about each signal, from another thread.
            end: Called with an exit code; ends the process.
            clock: Returns seconds that never go back.
        """
        self._say, self._end, self._clock = say, end, clock
        self._first: tuple[signal.Signals, float] | None = None
        self._reader = _SignalReader(SIGNALS, self._take)
        self._is_leaving = False

    @property
    def received(self) -> signal.Signals | None:
        """The first signal, or None."""
        return self._first[0] if self._first is not None else None

    def ignore(self) -> None:
        """Ignore all further signals, also after the block: this rank ends with its exit code.

        A launcher that sees one rank end sends signals to the others, which are about to end too.
        """
        self._is_leaving = True

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.stop(ignore=self._is_leaving)

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
    """Python handler that does nothing. It keeps the interpreter's C handler in place."""
