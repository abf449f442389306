"""Watch that ends a hanging rank: a thread compares each wait of the rank with a time limit."""

import threading
import time
from collections.abc import Callable

_LOOK_SECONDS = 0.1


class Watch:
    """Thread that calls a function if an expected event does not come in time.

    Args:
        expired: Called with a description of what the rank was doing. It must end the process: the wait may last for
            ever.
    """

    def __init__(self, expired: Callable[[str], None]) -> None:
        self._expired = expired
        self._now: tuple[str, float] | None = None  # one assignment, which is atomic in Python

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._look, name="doctor's watch", daemon=True).start()

    def expect(self, what: str, seconds: float) -> None:
        """Require that the next `expect` or `rest` comes in time.

        Args:
            what: Description of what this rank does now.
            seconds: Longest time it may take.
        """
        self._now = (what, time.monotonic() + seconds)

    def rest(self) -> None:
        """Expect nothing until the next `expect`."""
        self._now = None

    def _look(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            current = self._now
            if current is not None and time.monotonic() > current[1]:
                self._expired(current[0])
                return
