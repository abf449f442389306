"""Who is silent, gone or has failed, from values that ranks change as long as they live. Pure: no clock, no thread."""

from collections.abc import Mapping
from dataclasses import dataclass

PATIENCE_SECONDS = 4.0  # silence that counts once communication has failed: four beats
_SUSPECT_SECONDS = 2.5  # silence from which a rank may turn out to be the first one lost
_DELAY_SECONDS = 3.0  # between two looks: the observer itself was stopped, and what it missed is no silence

LEFT = "left"
FAILED = "failed: "


@dataclass(frozen=True)
class Absence:
    """A rank that is not there as it should be.

    Attributes:
        rank: The rank.
        seconds: Since its last sign of life, or since it was known to fail.
        reason: What is known beyond silence, to follow "rank N"; None: it is silent.
    """

    rank: int
    seconds: float
    reason: str | None = None

    @property
    def is_certain(self) -> bool:
        """Whether it can be named, once communication has failed."""
        return self.reason is not None or self.seconds >= PATIENCE_SECONDS

    def describe(self) -> str:
        """In words."""
        silence = f"has given no sign of life for {self.seconds:.0f} s"
        return f"rank {self.rank} {silence if self.reason is None else self.reason}"


def first_absence(absences: list[Absence]) -> Absence | None:
    """The one that began first: others may have ended because of it."""
    return max(absences, key=lambda absence: absence.seconds, default=None)


class Heartbeats:
    """Watches some ranks. Times are the observer's own: no clocks of two hosts are compared.

    A value is a number that grows while the rank lives, LEFT, or FAILED and a message.
    """

    def __init__(self, ranks: list[int], now: float) -> None:
        """ranks: Those to watch; now: seconds of any clock that only goes forward."""
        self._values = dict.fromkeys(ranks, "")
        self._changed = dict.fromkeys(ranks, now)
        self._reasons: dict[int, str] = {}
        self._looked = now

    @property
    def ranks(self) -> list[int]:
        """Those that are watched."""
        return list(self._values)

    def look(self, now: float) -> None:
        """Say that the observer is awake; call it every second. After a delay of its own it starts all clocks anew."""
        if now - self._looked > _DELAY_SECONDS:
            self._changed.update((rank, now) for rank in self._changed if rank not in self._reasons)
        self._looked = now

    def hear(self, values: Mapping[int, str], now: float) -> None:
        """Take in what the ranks have written."""
        for rank, value in values.items():
            if value != self._values[rank]:
                self._values[rank], self._changed[rank] = value, now
                if value.startswith(FAILED):
                    self._reasons[rank] = value

    def lose(self, rank: int, reason: str) -> None:
        """A rank is known to be gone since its last sign of life, unless it has said why."""
        if self._values[rank] != LEFT:
            self._reasons.setdefault(rank, reason)

    def absences(self, now: float) -> list[Absence]:
        """Ranks that have failed, or have been silent for so long that they may be lost; not those that have left."""
        found = []
        for rank, value in self._values.items():
            seconds = now - self._changed[rank]
            if rank in self._reasons:
                found.append(Absence(rank, seconds, self._reasons[rank]))
            elif value != LEFT and seconds >= _SUSPECT_SECONDS:
                found.append(Absence(rank, seconds))
        return found

    def num_present(self) -> int:
        """Ranks that have neither left nor failed."""
        return sum(value != LEFT and rank not in self._reasons for rank, value in self._values.items())
