"""The end of a rank that hangs: a thread that holds each thing the rank waits for against a time limit."""

import threading
import time
from collections.abc import Callable

_LOOK_SECONDS = 0.1


class Watch:
    """Calls a function, in a thread of its own, once what is expected does not come in time.

    Args:
        expired: Called with what was expected. It has to end the process: the wait may never be over.
    """

    def __init__(self, expired: Callable[[str], None]) -> None:
        self._expired = expired
        self._now: tuple[str, float] | None = None  # one assignment, which Python makes whole

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._look, name="doctor's watch", daemon=True).start()

    def expect(self, what: str, seconds: float) -> None:
        """The next `expect` or `rest` must come in time.

        Args:
            what: This rank does now, in words.
            seconds: It may take.
        """
        self._now = (what, time.monotonic() + seconds)

    def rest(self) -> None:
        """Nothing is expected for now."""
        self._now = None

    def _look(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            current = self._now
            if current is not None and time.monotonic() > current[1]:
                self._expired(current[0])
                return
