"""Heartbeats: which rank is silent, gone or failed, from values that living ranks change. Pure: no clock, no thread."""

from collections.abc import Mapping
from dataclasses import dataclass

PATIENCE_SECONDS = 4.0  # silence that counts once communication has failed: four heartbeats
_SUSPECT_SECONDS = 2.5  # silence after which a rank may turn out to be the first one lost
_DELAY_SECONDS = 3.0  # after a longer pause between two calls, the observer itself was stopped: that is no silence

LEFT = "left"
FAILED = "failed: "


@dataclass(frozen=True)
class Absence:
    """Absence of a rank that should be there.

    Attributes:
        rank: The absent rank.
        seconds: Time since its last heartbeat, or since its failure was known.
        reason: What is known apart from silence, to follow "rank N"; None: the rank is silent.
    """

    rank: int
    seconds: float
    reason: str | None = None

    @property
    def is_certain(self) -> bool:
        """Whether the rank can be named as lost, once communication has failed."""
        return self.reason is not None or self.seconds >= PATIENCE_SECONDS

    def describe(self) -> str:
        """Describe the absence in a clause: rank, and silence or reason."""
        silence = f"has given no sign of life for {self.seconds:.0f} s"
        return f"rank {self.rank} {silence if self.reason is None else self.reason}"


def first_absence(absences: list[Absence]) -> Absence | None:
    """Return the absence that began first, or None: the other ranks may have ended because of it."""
    return max(absences, key=lambda absence: absence.seconds, default=None)


class Heartbeats:
    """Heartbeats of some ranks, with times of the observer's own clock: clocks of two hosts are never compared.

    A rank's value is a number that grows while the rank lives, LEFT, or FAILED and a message.
    """

    def __init__(self, ranks: list[int], now: float) -> None:
        """Start to observe.

        Args:
            ranks: Ranks to observe.
            now: Seconds of a clock that never goes back.
        """
        self._values = dict.fromkeys(ranks, "")
        self._changed = dict.fromkeys(ranks, now)
        self._reasons: dict[int, str] = {}
        self._looked = now

    @property
    def ranks(self) -> list[int]:
        """Ranks that are observed."""
        return list(self._values)

    def look(self, now: float) -> None:
        """Note that the observer is awake. Call it every second: after a longer delay, each silence starts anew.

        Args:
            now: Seconds of the clock.
        """
        if now - self._looked > _DELAY_SECONDS:
            self._changed.update((rank, now) for rank in self._changed if rank not in self._reasons)
        self._looked = now

    def hear(self, values: Mapping[int, str], now: float) -> None:
        """Take in the values that ranks have written.

        Args:
            values: Value of each rank.
            now: Seconds of the clock.
        """
        for rank, value in values.items():
            if value != self._values[rank]:
                self._values[rank], self._changed[rank] = value, now
                if value.startswith(FAILED):
                    self._reasons[rank] = value

    def lose(self, rank: int, reason: str) -> None:
        """Note that a rank has been gone since its last heartbeat, unless it has left or has given its own reason.

        Args:
            rank: Rank that is gone.
            reason: How it is known, to follow "rank N".
        """
        if self._values[rank] != LEFT:
            self._reasons.setdefault(rank, reason)

    def absences(self, now: float) -> list[Absence]:
        """List the ranks that have failed, or are silent so long that they may be lost, without ranks that have left.

        Args:
            now: Seconds of the clock.
        """
        found = []
        for rank, value in self._values.items():
            seconds = now - self._changed[rank]
            if rank in self._reasons:
                found.append(Absence(rank, seconds, self._reasons[rank]))
            elif value != LEFT and seconds >= _SUSPECT_SECONDS:
                found.append(Absence(rank, seconds))
        return found

    def num_present(self) -> int:
        """Count the ranks that have neither left nor failed."""
        return sum(value != LEFT and rank not in self._reasons for rank, value in self._values.items())
